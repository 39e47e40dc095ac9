"""Preemption and Ctrl-C: after SIGTERM or SIGINT a run saves its state before it exits."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

# Exit codes after SIGTERM and SIGINT. Launchers restart a run after the first (EX_TEMPFAIL of sysexits.h), and not
# after the second, which is the shell's exit code for Ctrl-C.
RESTART, INTERRUPTED = 75, 130


class Stopped(SystemExit):
    """A run has stopped after a signal, and its state is saved. Exits with a code of this module."""


class PreemptionHandler:
    """A context manager in which SIGTERM and SIGINT set `code` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt. Outside the main thread, where Python allows no handlers, the manager
    does nothing.

    Attributes:
      code: the exit code for the last signal; 0 without a signal.
    """

    def __init__(self) -> None:
        self.code = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # These handlers replace that of jax.distributed, which was installed before.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Set the code, and do nothing else: a signal may interrupt any operation."""
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = max(self.code, RESTART if number == signal.SIGTERM else INTERRUPTED)
