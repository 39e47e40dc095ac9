"""Where a run's time goes: every second belongs to one phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Phase = Literal["compile", "data", "step", "checkpoint", "evaluate"]


class Phases:
    """Seconds by phase since they were last taken, by a clock that nobody can set.

    `step` is the phase between the others: dispatching, waiting for the device, and writing what was measured.

    Attributes:
      now: the phase that the run is in.
      since: when it came there, by `time.monotonic()`.
    """

    def __init__(self) -> None:
        self.now: Phase = "step"
        self.since = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The block is of this phase."""
        before = self.now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> dict[str, float]:
        """The seconds of each phase that had any, which are then counted from zero."""
        self._enter(self.now)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self._seconds[self.now] = self._seconds.get(self.now, 0.0) + now - self.since
        self.now, self.since = phase, now
