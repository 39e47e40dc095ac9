"""Measure the input pipeline: images per second, waits of a training step, and memory."""

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
from collections import Counter
from collections.abc import Iterator

from tclip_jax.data.bad_samples import format_counts
from tclip_jax.data.sources import FAULTS
from tclip_jax.log import in_workers
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.input import train_data

_SAMPLE_SECONDS = 1.0  # between two samples of the memory, each of which takes milliseconds


@dataclasses.dataclass(frozen=True)
class InputSpeed:
    """The speed of the input pipeline with one number of workers.

    Attributes:
      workers: worker processes.
      first_seconds: time from opening the source to the first batch.
      images_per_second: throughput when batches are taken without a pause.
      images_per_core_second: images per second of CPU time, which other load on the machine hardly changes; None if the
        system does not report CPU time.
      wait_share: fraction of time that simulated training steps wait for a batch; None if no steps were simulated.
      peak_bytes: peak memory of this process and its workers, with shared pages counted once; None if the system does
        not report memory.
      weightless: fraction of samples with weight 0.
      bad: number of these samples by kind of fault.
    """

    workers: int
    first_seconds: float
    images_per_second: float
    images_per_core_second: float | None
    wait_share: float | None
    peak_bytes: int | None
    weightless: float
    bad: dict[str, int]


def measure(run: RunConfig, workers: int, *, seconds: float, step_seconds: float) -> InputSpeed:
    """Measure the input pipeline of a run in a new process, whose memory is that of the pipeline alone.

    The call takes about `seconds`, and as long again to measure waits.

    Args:
      run: the run, whose number of workers is replaced by `workers`.
      workers: worker processes; 0 loads in the process itself.
      seconds: duration of the measurement of throughput, and of that of waits.
      step_seconds: duration of a simulated training step, which sleeps; 0 to measure no waits.

    Raises:
      ValueError: every sample has weight 0.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, in_workers()) as pool:
        return pool.submit(_measure, run, workers, seconds, step_seconds).result()


def process_memory(pid: int) -> int | None:
    """Return the bytes of memory of a process and its descendants; shared pages count once. None without /proc."""
    total = 0
    for member in _process_tree(pid):
        try:
            text = pathlib.Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            # A worker may have ended since it was listed.
            if member == pid:
                return None
            continue
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += 1024 * int(match[1]) if match else 0
    return total


def process_seconds(pid: int) -> float:
    """Return the CPU time in seconds of a process and its descendants; 0 without /proc."""
    ticks = 0
    for member in _process_tree(pid):
        with contextlib.suppress(OSError):
            # The name in parentheses may contain spaces. After it, user and system time are the fields 12 and 13.
            fields = pathlib.Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _measure(run: RunConfig, workers: int, seconds: float, step_seconds: float) -> InputSpeed:
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, workers=workers))
    with _peak_memory() as peak:
        started = time.perf_counter()
        data = train_data(run)
        batch = next(data)
        first = time.perf_counter() - started
        images, faults, started, cpu_seconds = 0, Counter[int](), time.perf_counter(), process_seconds(os.getpid())
        while (elapsed := time.perf_counter() - started) < seconds or not images:
            batch = next(data)
            images += len(batch["weight"])
            faults.update(batch["fault"].tolist())
        cpu_seconds = process_seconds(os.getpid()) - cpu_seconds
        waited, started = 0.0, time.perf_counter()
        while step_seconds and time.perf_counter() - started < seconds:
            requested = time.perf_counter()
            next(data)
            waited += time.perf_counter() - requested
            time.sleep(step_seconds)
        share = waited / (time.perf_counter() - started) if step_seconds else None
        data.close()
    bad = {kind: faults[i] for i, kind in enumerate(FAULTS) if i and faults[i]}
    if not faults[0]:
        raise ValueError(
            f"{run.data.source}: not one of {images:,} images can be used ({format_counts(bad)}), so there is no speed"
            " to measure"
        )
    per_core = images / cpu_seconds if cpu_seconds else None
    weightless, memory = sum(bad.values()) / images, peak[0] if peak else None
    return InputSpeed(workers, first, images / elapsed, per_core, share, memory, weightless, bad)


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Sample `process_memory` during the block; yield a list with the maximum, or an empty list if it is unknown."""
    peak: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while (size := process_memory(os.getpid())) is not None:
            peak[:] = [max([size, *peak])]
            if done.wait(_SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _process_tree(pid: int) -> list[int]:
    """List a process and its descendants."""
    members = [pid]
    for member in members:
        for path in pathlib.Path(f"/proc/{member}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                members += map(int, path.read_text().split())
    return members
