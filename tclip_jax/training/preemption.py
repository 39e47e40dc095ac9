"""PreemptionHandler to stop: a machine that is about to be taken away, or a person who has seen enough."""

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
    """A context manager within which SIGTERM and SIGINT are notices to be obeyed, not ends.

    A second SIGINT is one. Outside the main thread nothing is listened to, since Python allows no more there.

    Attributes:
      code: with which to exit; 0 as long as nobody asked.
    """

    def __init__(self) -> None:
        self.code = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Installed after jax.distributed's own handler of SIGTERM, this one takes its place.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Only remembers: what else a handler does may be in the midst of what it interrupts."""
        if number == signal.SIGINT and self.code == INTERRUPTED:
            raise KeyboardInterrupt
        self.code = max(self.code, RESTART if number == signal.SIGTERM else INTERRUPTED)
