"""Preemption and Ctrl-C: SIGTERM and SIGINT let a run save its state before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

# Exit codes by what was asked for. Launchers start a run again on the first (EX_TEMPFAIL of sysexits.h), and not on the
# second, which a shell gives to what Ctrl-C ended.
RESTART, INTERRUPTED = 75, 130


class Stopped(SystemExit):
    """A run that was asked to stop, and is saved; ends the process with a code of this module."""


class PreemptionHandler:
    """A context manager in which SIGTERM and SIGINT set `code` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread Python allows no handlers, and none is set.

    Attributes:
      code: exit code to end with; 0 while no signal has come.
    """

    def __init__(self) -> None:
        self.code = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Installed after jax.distributed's own handler of SIGTERM, this one takes its place.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Sets the code and does nothing else: a handler may interrupt anything."""
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = max(self.code, RESTART if number == signal.SIGTERM else INTERRUPTED)
