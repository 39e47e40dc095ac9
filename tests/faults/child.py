"""Runs `tclip` with injected faults: `python child.py FAULT[=VALUE],… COMMAND …`."""

from __future__ import annotations

import errno
import os
import pathlib
import sys
import time
from typing import Any

import jax.numpy as jnp

from tclip_jax import cli
from tclip_jax.runs import checkpoints
from tclip_jax.runs.checkpoints import Checkpoints
from tclip_jax.training.input import ResumableIterator
from tclip_jax.training.metrics import Telemetry
from tclip_jax.training.objective import Objective


def before_batch(number: int, fault: Any) -> None:
    """Calls `fault` before the batch `number` of this process, counted from 1; before every batch if it is 0."""
    following, count = ResumableIterator.__next__, [0]

    def patched(self: ResumableIterator) -> Any:
        count[0] += 1
        if count[0] == number or number == 0:
            fault()
        return following(self)

    ResumableIterator.__next__ = patched  # type: ignore[method-assign]


def slow(seconds: str) -> None:
    """Delays every batch, so that a test can act between steps."""
    before_batch(0, lambda: time.sleep(float(seconds)))


def late(seconds: str) -> None:
    """Delays the start of process 1."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":
        time.sleep(float(seconds))


def jumping(seconds: str) -> None:
    """Makes the wall clock jump forward and back by so many seconds."""
    true, count = time.time, [0]

    def jump() -> float:
        count[0] += 1
        return true() + (float(seconds) if count[0] // 3 % 2 else -float(seconds))

    time.time = jump
    true_ns = time.time_ns
    time.time_ns = lambda: true_ns() + int(1e9 * float(seconds) * (-1 if count[0] // 3 % 2 else 1))


def full(number: str) -> None:
    """Fails with a full disk when the checkpoint of that step is finished."""
    write = checkpoints.write_checksums

    def fail(folder: Any) -> None:
        if folder.name.startswith(f"{number}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder)

    checkpoints.write_checksums = fail


def small(number: str) -> None:
    """Limits files to 64 KiB from the save of that step on."""
    import resource

    save = Checkpoints.save

    def limited(self: Checkpoints, now: int, *rest: Any) -> None:
        if now == int(number):
            self.wait()  # until the checkpoint before is whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        save(self, now, *rest)

    Checkpoints.save = limited  # type: ignore[method-assign]


def hang(batch: str) -> None:
    """Makes process 1 wait forever for that batch."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":
        before_batch(int(batch), lambda: time.sleep(3600))


def lost(batch: str) -> None:
    """Makes process 1 fail to read that batch."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":

        def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "shard 7")

        before_batch(int(batch), fail)


def metrics(step: str) -> None:
    """Fails with a full disk when the metrics of that step are written, by process 0."""
    append = Telemetry._append

    def fail(self: Telemetry, values: dict[str, Any]) -> None:
        if values["step"] == int(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        append(self, values)

    Telemetry._append = fail  # type: ignore[method-assign]


def worker(batch: str) -> None:
    """Kills a data worker before that batch."""
    import multiprocessing

    before_batch(int(batch), lambda: multiprocessing.active_children()[0].kill())


def nan(steps: str) -> None:
    """Makes the loss NaN for the first batches of this process, which negative weights mark."""
    following, count, loss = ResumableIterator.__next__, [0], Objective.loss

    def marked(self: ResumableIterator) -> Any:
        batch = following(self)
        count[0] += 1
        if count[0] <= int(steps):
            batch["weight"] = -batch["weight"]
        return batch

    def spoiled(self: Objective, params: Any, teacher_params: Any, batch: Any, *rest: Any) -> Any:
        total, metrics = loss(self, params, teacher_params, batch | {"weight": abs(batch["weight"])}, *rest)
        spoil = jnp.where(jnp.any(batch["weight"] < 0), jnp.nan, 1.0)
        return total * spoil, metrics | {"loss": metrics["loss"] * spoil}

    ResumableIterator.__next__ = marked  # type: ignore[method-assign]
    Objective.loss = spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    for each in filter(None, sys.argv[1].split(",")):
        name, _, value = each.partition("=")
        globals()[name](value)
    sys.argv[0] = str(pathlib.Path(sys.argv[0]).parent)
    sys.exit(cli.main(sys.argv[2:]))
