"""How fast batches come, how long a step would wait for them, and what memory they take."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator

from tclip_jax.runs.config import RunConfig
from tclip_jax.training.input import train_data

_SAMPLE_SECONDS = 1.0  # between two looks at the memory, which take milliseconds of work


@dataclasses.dataclass(frozen=True)
class InputSpeed:
    """What was measured with one number of workers.

    Attributes:
      first_seconds: from opening the source to the first batch.
      images_per_second: where the next batch is asked for at once.
      images_per_core_second: per second that a processor worked, which other load on the machine hardly changes; None
        where the system does not say.
      wait_share: of the time of steps of a given length that was spent waiting; None if no length was given.
      peak_bytes: of memory of this process and its workers, pages that they share counted once; None where the system
        does not say.
      weightless: share of samples with weight 0.
    """

    workers: int
    first_seconds: float
    images_per_second: float
    images_per_core_second: float | None
    wait_share: float | None
    peak_bytes: int | None
    weightless: float


def measure(run: RunConfig, workers: int, *, seconds: float, step_seconds: float) -> InputSpeed:
    """Measures in a process of its own, so that no earlier measurement's memory counts; at most 2 · `seconds` long.

    `step_seconds` is how long an accelerator would take for a batch, 0 to leave that out; it is slept, not computed.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measure, run, workers, seconds, step_seconds).result()


def process_memory(pid: int) -> int | None:
    """Bytes that a process and its descendants hold, shared pages once; None where /proc does not say."""
    total = 0
    for each in _family(pid):
        try:
            held = re.search(r"^Pss:\s+(\d+) kB", pathlib.Path(f"/proc/{each}/smaps_rollup").read_text(), re.MULTILINE)
        except OSError:
            # A worker may have ended since it was listed.
            if each == pid:
                return None
            continue
        total += 1024 * int(held[1]) if held else 0
    return total


def process_seconds(pid: int) -> float:
    """Seconds that processors have worked for a process and its descendants; 0 where /proc does not say."""
    ticks = 0
    for each in _family(pid):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold blanks; behind it user and system time are the 12th and the 13th field.
            fields = pathlib.Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _measure(run: RunConfig, workers: int, seconds: float, step_seconds: float) -> InputSpeed:
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
    with _peak_memory() as peak:
        started = time.perf_counter()
        data = train_data(run)
        batch = next(data)
        first = time.perf_counter() - started
        images, weight, started, worked = 0, 0.0, time.perf_counter(), process_seconds(os.getpid())
        while (spent := time.perf_counter() - started) < seconds or not images:
            batch = next(data)
            images += len(batch["weight"])
            weight += float(batch["weight"].sum())
        worked = process_seconds(os.getpid()) - worked
        waited, started = 0.0, time.perf_counter()
        while step_seconds and time.perf_counter() - started < seconds:
            asked = time.perf_counter()
            next(data)
            waited += time.perf_counter() - asked
            time.sleep(step_seconds)
        share = waited / (time.perf_counter() - started) if step_seconds else None
        data.close()
    if not weight:
        raise ValueError(f"{run.data.source}: not one of {images:,} images can be used, so their speed means nothing")
    per_core = images / worked if worked else None
    return InputSpeed(workers, first, images / spent, per_core, share, peak[0] if peak else None, 1 - weight / images)


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yields a list that holds the largest `process_memory` seen in the block, and nothing where there is none."""
    peak: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while (now := process_memory(os.getpid())) is not None:
            peak[:] = [max([now, *peak])]
            if done.wait(_SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _family(pid: int) -> list[int]:
    family = [pid]
    for each in family:
        for path in pathlib.Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += map(int, path.read_text().split())
    return family
