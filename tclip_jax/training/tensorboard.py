"""TensorBoard's file of events, written by the caller.

`tensorboardX.SummaryWriter` writes in a thread: on a full disk it ends unheard, and its queue then fills up and blocks
the run.
"""

from __future__ import annotations

import os
import time
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import histogram_raw, scalar

_FLUSH_SECONDS = 120.0  # an object store gets the whole file at each flush


class EventFile:
    """A file of scalars and histograms; what older files of the folder say of `first_step` and later is hidden."""

    def __init__(self, folder: epath.PathLike, first_step: int) -> None:
        directory_check(os.fspath(folder))
        self._file = EventsWriter(os.path.join(os.fspath(folder), "events"))
        self._flushed = time.monotonic()
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a finite number."""
        self._add(Event(summary=scalar(name, value)), step)

    def histogram(self, name: str, step: int, **parts: Any) -> None:
        """Adds a histogram by its `min`, `max`, `num`, `sum`, `sum_squares`, `bucket_limits` and `bucket_counts`."""
        self._add(Event(summary=histogram_raw(name, **parts)), step)

    def flush(self) -> None:
        """Waits until all that was added is in the file."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._file.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()
