"""`kill -9` of one of two processes at random moments: nothing is lost beyond the last checkpoint, nothing is twice."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

KILLS = int(os.environ.get("TCLIP_KILLS", "20"))
OPTIONS = ("--config.steps=90", "--config.checkpoint.every=2")


@pytest.mark.faults
def test_killed_twenty_times_and_bit_identical_in_the_end(start: Callable[..., Any]) -> None:
    seed = int(os.environ.get("TCLIP_FAULT_SEED", random.randrange(2**32)))
    print(f"TCLIP_FAULT_SEED={seed}")
    rng = random.Random(seed)
    whole, run = start("whole"), start("killed")
    whole.finish("", *OPTIONS)
    checkpoints, writing = run.workdir / "checkpoints", 0
    for number in range(KILLS):
        saved = max(run.saved(), default=0)
        run.start("slow=0.05", *OPTIONS)
        # While it starts, between steps, or while a checkpoint is written.
        moment = rng.choices(["start", "step", "checkpoint"], [1, 3, 4])[0]
        more = saved + rng.randint(1, 4)
        if moment == "step":
            assert run.until(lambda more=more: more <= max(run.steps(), default=0)), run.log()
        elif moment == "checkpoint":
            assert run.until(lambda: any(checkpoints.glob("*.orbax*"))), run.log()
        time.sleep(rng.uniform(0, {"start": 6.0, "step": 0.1, "checkpoint": 0.05}[moment]))
        run.kill(rng.randrange(2))
        writing += any(checkpoints.glob("*.orbax*"))
        steps = run.steps()
        assert max(run.saved(), default=0) >= saved, number
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= max(run.saved(), default=0), number
    print(f"{KILLS} kills, {writing} of them left a checkpoint half written")
    assert writing
    run.finish("", *OPTIONS)
    assert run.steps() == list(range(1, 91))
    run.assert_same(whole)
