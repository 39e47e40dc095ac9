"""The watchdog: it detects a stalled run, names the processes that are behind, and dumps their stacks."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple, Self

import jax
from etils import epath

from tclip_jax.parallel.distributed import LostProcess
from tclip_jax.storage import write_atomic
from tclip_jax.training.timing import StepTimer

_ACTIVITIES = {"data": "waiting for data", "checkpoint": "writing a checkpoint", "step": "waiting for the devices"}
_UNLIMITED = ("compile", "evaluate")  # phases that may take any time

_logger = logging.getLogger(__name__)


class Heartbeat(NamedTuple):
    """The state of a process, as it writes it to the workdir.

    Attributes:
      step: the last step that it began.
      phase: the current phase of its `StepTimer`.
      seconds: since the phase began.
      host: host name and process id.
      beat: the number of its heartbeats so far.
      behind: the processes that are behind, as process 0 decides.
      silent: seconds since the reader last read a new beat, by the reader's clock.
    """

    step: int
    phase: str
    seconds: float
    host: str
    beat: int
    behind: tuple[int, ...] = ()
    silent: float = 0.0


class Watchdog:
    """A thread that detects a stalled run; a context manager.

    When no step has ended for `minutes`, the log names the processes that are behind, and these dump the stacks of
    their threads to stderr. With `leave`, all processes then exit with code 69, after which launchers restart the run a
    few times. Compilation and evaluation have no limit. With several processes, each writes heartbeats to the workdir's
    `heartbeats/`. When a stall is near, process 0 reads the heartbeats of all, and the others read that of process 0.
    Durations are measured by monotonic clocks, and clocks of different machines are never compared.

    Args:
      workdir: of the run, shared by all processes.
      timer: the phases of this process.
      minutes: time without a finished step that counts as a stall; 0 for no watchdog.
      leave: exit after a stall.
    """

    def __init__(self, workdir: epath.PathLike, timer: StepTimer, minutes: float, *, leave: bool = False) -> None:
        self._folder, self._timer, self._leave = epath.Path(workdir) / "heartbeats", timer, leave
        self._limit, self._every = 60 * minutes, min(60.0, 12 * minutes)
        self._step, self._ended = 0, time.monotonic()
        self._behind: tuple[int, ...] | None = None
        self._beats: dict[int, Heartbeat] = {}
        self._heard: dict[int, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self, step: int) -> None:
        """Record that `step` begins, and the step before has ended."""
        self._step, self._ended, self._behind = step, time.monotonic(), None

    def _watch(self) -> None:
        while not self._closing.wait(self._every):
            try:
                self._check()
            except Exception as error:  # a failing disk must not end the watchdog
                _logger.warning(
                    "%s: cannot read or write heartbeats: %s: %s", self._folder, type(error).__name__, error
                )

    def _check(self) -> None:
        if self._timer.now in _UNLIMITED:
            self._ended = time.monotonic()
        stalled, me, silence = time.monotonic() - self._ended, jax.process_index(), 1.5 * self._every
        self._write(me)
        if stalled > self._limit - 3 * self._every:
            self._read(range(jax.process_count()) if me == 0 else (0,))
            if any(beat.phase in _UNLIMITED and beat.silent <= silence for beat in self._beats.values()):
                self._ended = time.monotonic()  # the processes wait for one in an unlimited phase
                return
        if stalled <= self._limit or self._behind is not None:
            return
        first = self._beats.get(0)
        decides = me == 0 or (first is not None and first.silent > silence)
        behind = slowest(self._beats, silence) if decides else first.behind if first else ()
        if not behind:
            return
        self._behind = behind
        self._write(me)
        if decides and me < 2:
            report = stall_report(self._beats, behind, silence)
            _logger.error("no step has ended for %.1f minutes: %s", stalled / 60, report)
        if me in behind:
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._leave:
            if decides:  # the others must read the decision and exit first: jax aborts processes that lose process 0
                self._closing.wait(3 * self._every)
            os._exit(LostProcess.exit_code)

    def _write(self, me: int) -> None:
        beat = self._beats[me].beat + 1 if me in self._beats else 0
        seconds, host = time.monotonic() - self._timer.since, f"{socket.gethostname()}, process {os.getpid()}"
        self._beats[me] = Heartbeat(self._step, self._timer.now, seconds, host, beat, self._behind or ())
        if jax.process_count() > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._folder / f"{me}.json", json.dumps(self._beats[me]._asdict()))

    def _read(self, processes: Iterable[int]) -> None:
        now = time.monotonic()
        for index in processes:
            path = self._folder / f"{index}.json"
            if index == jax.process_index() or not path.exists():
                continue
            beat = Heartbeat(**json.loads(path.read_text()))
            if index not in self._beats or beat.beat != self._beats[index].beat:
                self._heard[index] = now
            self._beats[index] = beat._replace(behind=tuple(beat.behind), silent=now - self._heard[index])


def slowest(beats: Mapping[int, Heartbeat], silence: float) -> tuple[int, ...]:
    """Return the processes that are behind.

    These are the processes without a new heartbeat for `silence` seconds. If there are none, they are the processes at
    the lowest step, and among these the ones in other phases than `step`: a process that waits for the devices waits
    for the other processes.
    """
    silent = [index for index, beat in beats.items() if beat.silent > silence]
    least = min(beat.step for beat in beats.values())
    last = [index for index, beat in beats.items() if beat.step == least]
    return tuple(sorted(silent or [index for index in last if beats[index].phase != "step"] or last))


def stall_report(beats: Mapping[int, Heartbeat], behind: tuple[int, ...], silence: float) -> str:
    """Return one line with step and phase of the processes that are behind, and the steps of the others."""

    def one(index: int) -> str:
        beat = beats[index]
        silent = f", no heartbeat for {beat.silent:.0f} s" if beat.silent > silence else ""
        phase = f"{_ACTIVITIES.get(beat.phase, beat.phase)} for {beat.seconds + beat.silent:.0f} s"
        return f"process {index} ({beat.host}) is in step {beat.step}, {phase}{silent}"

    others = sorted({beat.step for index, beat in beats.items() if index not in behind})
    more = [f"{len(behind) - 8} more"] if len(behind) > 8 else []
    rest = [f"the others are in step {', '.join(map(str, others))}"] if others else []
    return "; ".join([*map(one, behind[:8]), *more, *rest])
