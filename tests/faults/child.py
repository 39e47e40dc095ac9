"""`tclip` with a fault inside: `python child.py FAULT[=VALUE],… COMMAND …`."""

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
    """Calls `fault` in place of nothing before the batch of that number, counted from the start of the process."""
    following, count = ResumableIterator.__next__, [0]

    def patched(self: ResumableIterator) -> Any:
        count[0] += 1
        if count[0] == number or number == 0:
            fault()
        return following(self)

    ResumableIterator.__next__ = patched  # type: ignore[method-assign]


def slow(seconds: str) -> None:
    """Every batch takes so long, that there be moments between steps."""
    before_batch(0, lambda: time.sleep(float(seconds)))


def late(seconds: str) -> None:
    """Process 1 starts so much later."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":
        time.sleep(float(seconds))


def jumping(seconds: str) -> None:
    """The wall clock goes forward and back by so much, at every other reading."""
    true, count = time.time, [0]

    def jump() -> float:
        count[0] += 1
        return true() + (float(seconds) if count[0] // 3 % 2 else -float(seconds))

    time.time = jump
    true_ns = time.time_ns
    time.time_ns = lambda: true_ns() + int(1e9 * float(seconds) * (-1 if count[0] // 3 % 2 else 1))


def full(number: str) -> None:
    """No space is left when the checkpoint of that step is finished."""
    write = checkpoints.write_checksums

    def fail(folder: Any) -> None:
        if folder.name.startswith(f"{number}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        write(folder)

    checkpoints.write_checksums = fail


def small(number: str) -> None:
    """No file may be larger than 64 KiB from the save of that step on, which the kernel sees to."""
    import resource

    save = Checkpoints.save

    def limited(self: Checkpoints, now: int, *rest: Any) -> None:
        if now == int(number):
            self.wait()  # the one before is whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
        save(self, now, *rest)

    Checkpoints.save = limited  # type: ignore[method-assign]


def hang(batch: str) -> None:
    """Process 1 never gets that batch."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":
        before_batch(int(batch), lambda: time.sleep(3600))


def lost(batch: str) -> None:
    """Process 1 cannot read that batch."""
    if os.environ.get("TCLIP_PROCESS_ID") == "1":

        def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "shard 7")

        before_batch(int(batch), fail)


def metrics(step: str) -> None:
    """No space is left for the metrics of that step, which process 0 alone writes."""
    append = Telemetry._append

    def fail(self: Telemetry, values: dict[str, Any]) -> None:
        if values["step"] == int(step):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        append(self, values)

    Telemetry._append = fail  # type: ignore[method-assign]


def worker(batch: str) -> None:
    """A process that prepares data is killed before that batch."""
    import multiprocessing

    before_batch(int(batch), lambda: multiprocessing.active_children()[0].kill())


def nan(steps: str) -> None:
    """The loss of the first batches of the process, so many, is no number: they are marked by a weight below 0."""
    following, count, judge = ResumableIterator.__next__, [0], Objective.loss

    def marked(self: ResumableIterator) -> Any:
        batch = following(self)
        count[0] += 1
        if count[0] <= int(steps):
            batch["weight"] = -batch["weight"]
        return batch

    def spoiled(self: Objective, params: Any, teacher_params: Any, batch: Any, *rest: Any) -> Any:
        total, metrics = judge(self, params, teacher_params, batch | {"weight": abs(batch["weight"])}, *rest)
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
