"""Time for which saving a checkpoint blocks training: `python -m benchmarks.checkpoint [--quick] [--json]`.

Saves the state of a run (parameters and both moments of AdamW) after a step, as `tclip train` does. Times three parts:
the call that blocks the loop, the write in the background with its checksums, and the step that runs during the write.
A ratio is the median over rounds of the ratio within a round, because absolute times vary on a shared machine. Exits
with 1 if a save blocks for longer than a step, and always with 0 under --quick, whose rounds are too few.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.train_step import draw_batch
from tclip_jax.models.presets import PRESETS, model_cfg, preprocess_cfg
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.schema import count
from tclip_jax.training.build import Build

BUDGET = 1.0  # steps


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds until the action has returned and its arrays are computed."""
    started = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - started


def measure(preset: str, batch_size: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of every part in every round, after a round that compiles, and the bytes of the state."""
    config = base_config()
    config.model, config.preprocess, config.ternary = model_cfg(preset), preprocess_cfg(), "Q-ALL"
    config.data.batch_size, config.remat = batch_size, True
    run, mesh = run_config(config), make_mesh(devices=jax.devices()[:1])
    build, seconds = Build(run, mesh, None), dict[str, list[float]]()
    with (
        jax.set_mesh(mesh),
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(folder, CheckpointConfig(keep=1)) as checkpoints,
    ):
        state = build.init_state()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        step_function, batch = build.jitted_step(state), shard_batch(draw_batch(run.model, batch_size), mesh)
        held = {"state": state}

        def step() -> Any:
            held["state"], metrics = step_function(held["state"], batch, None)
            return metrics

        for number in range(rounds + 1):
            step()
            parts = {
                "step": timed(step),
                "save blocks": timed(functools.partial(checkpoints.save, number + 1, held["state"].trees(), {})),
                "step while writing": timed(step),
                "rest of writing": timed(checkpoints.wait),
            }
            for name, value in parts.items() if number else ():
                seconds.setdefault(name, []).append(value)
    return seconds, size


def main() -> int:
    """Print seconds and the ratio, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="ViT-B-16", help="default ViT-B-16")
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="pairs in a step (default 8)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="number of rounds (default 5)")
    parser.add_argument("--quick", action="store_true", help="the preset 'tiny', two rounds; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.rounds, args.batch = "tiny", 2, 32
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    seconds, size = measure(args.preset, args.batch, args.rounds)
    print(f"{args.preset}, batch {args.batch}, state of {size / 2**20:.0f} MiB, {len(os.sched_getaffinity(0))} cores")
    for name, values in seconds.items():
        print(f"{name:30}{statistics.median(values):>10.4f} s")
    ratio = statistics.median(a / b for a, b in zip(seconds["save blocks"], seconds["step"], strict=True))
    passed = ratio <= BUDGET
    print(f"{'save blocks / step':30}{ratio:>10.3f}    budget {BUDGET:g}{'' if passed else '  OVER'}")
    if args.json:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        figures = [{"name": "save blocks / step", "ratio": ratio, "budget": BUDGET, "passed": passed}]
        setup = {"preset": args.preset, "batch": args.batch, "bytes": size}
        print(json.dumps(setup | {"seconds": medians, "figures": figures}))
    return 0 if passed or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
