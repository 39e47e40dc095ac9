"""Time of a training step: `python -m benchmarks.train_step [--quick] [--json]`.

Times one step (forward, contrastive loss, backward, AdamW) of the same model in full precision and ternary, a trit
snapshot, and the full-precision step of open_clip in PyTorch, which needs the extra `torch`. The runs are interleaved.
A ratio is the median over rounds of the ratio within a round, because absolute times vary on a shared machine. Exits
with 1 if a ratio is over its budget, and always with 0 under --quick, whose rounds are too few.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD, normalize
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.models.trits import trit_metrics, trit_snapshot
from tclip_jax.numerics.torch_side import import_torch
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.runs.config import LossConfig, OptimizerConfig, base_config
from tclip_jax.schema import count
from tclip_jax.ternary import Quantizer
from tclip_jax.training.objective import Encoders
from tclip_jax.training.optimizer import make_optimizer
from tclip_jax.training.state import init_state
from tclip_jax.training.step import make_train_step

OPTIMIZER = OptimizerConfig()
# name of the ratio -> (numerator, denominator, upper bound)
BUDGETS = {
    "ternary / full precision": ("ternary", "full", 1.05),
    "JAX / open_clip in PyTorch": ("full", "torch", 0.9),
    "telemetry of trits / ternary": ("look", "ternary", 0.02),
}


def draw_batch(config: CLIPConfig, rows: int) -> dict[str, np.ndarray]:
    """Return random pixels and tokens; the last token of each text is the end-of-text token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.text.vocab_size - 1, (rows, config.text.context_length), np.int32)
    tokens[:, -1] = config.text.vocab_size - 1
    images = rng.integers(0, 256, (rows, *config.vision.image_size, 3), np.uint8)
    return {"image": images, "tokens": tokens, "weight": np.ones(rows, np.float32)}


def jax_steps(config: CLIPConfig, rows: int, rules: TernaryRules) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a function that trains one step, and one that computes a trit snapshot and its metrics."""
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(OPTIMIZER, 1000)
    clip = CLIP(config, rules)
    student = Encoders(clip, OPENAI_MEAN, OPENAI_STD)
    step = jax.jit(make_train_step(student, None, optimizer, LossConfig()), donate_argnums=0)
    with jax.set_mesh(mesh):
        held = {"state": init_state(clip, optimizer, 0, None, mesh)}
    batch = shard_batch(draw_batch(config, rows), mesh)

    def run() -> None:
        with jax.set_mesh(mesh):
            held["state"], metrics = step(held["state"], batch, None)
        jax.block_until_ready(metrics)

    def snapshot() -> None:
        params = held["state"].params["clip"]
        jax.block_until_ready(trit_metrics(trit_snapshot(params, rules), params, rules))

    return run, snapshot


def torch_step(config: CLIPConfig, rows: int) -> Callable[[], None]:
    """Return a function that trains one step in open_clip, with its loss, on the cores that JAX uses."""
    torch = import_torch()
    import open_clip

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    batch, module = draw_batch(config, rows), open_clip.CLIP(**config.to_open_clip())
    pixels = normalize(batch["image"], OPENAI_MEAN, OPENAI_STD)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    tokens, loss = torch.from_numpy(batch["tokens"]).long(), open_clip.ClipLoss()
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    others = [p for p in module.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
        OPTIMIZER.learning_rate,
        (OPTIMIZER.b1, OPTIMIZER.b2),
        OPTIMIZER.eps,
    )

    def run() -> None:
        optimizer.zero_grad()
        loss(*module(images, tokens)).backward()
        optimizer.step()
        with torch.no_grad():
            module.logit_scale.clamp_(0, np.log(100))

    return run


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every run in every round; the first run of each compiles.

    An untimed run of the same kind precedes each timed run: a JAX step right after a PyTorch step takes 1.5x as long.
    """
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> int:
    """Print seconds and ratios, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="ViT-B-16", help="default ViT-B-16")
    parser.add_argument("--batch", type=count, default=8, metavar="N", help="pairs in a step (default 8)")
    parser.add_argument("--rounds", type=count, default=9, metavar="N", help="number of rounds (default 9)")
    parser.add_argument("--quick", action="store_true", help="the preset 'tiny', three rounds; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.rounds, args.batch = "tiny", 3, 32
    config, rules = CLIPConfig.from_open_clip(model_cfg(args.preset)), ternary_rules("Q-ALL", Quantizer())
    full, _ = jax_steps(config, args.batch, ())
    ternary, snapshot = jax_steps(config, args.batch, rules)
    runs = {"full": full, "ternary": ternary, "look": snapshot, "torch": torch_step(config, args.batch)}
    seconds = measure(runs, args.rounds)
    # A trit snapshot is computed once in `telemetry_every` steps.
    seconds["look"] = [each / base_config().telemetry_every for each in seconds["look"]]
    print(f"{args.preset}, batch {args.batch}, {len(os.sched_getaffinity(0))} cores, {args.rounds} rounds")
    for name, values in seconds.items():
        print(f"{name:30}{statistics.median(values):>10.4f} s")
    figures: list[dict[str, Any]] = []
    for name, (numerator, denominator, budget) in BUDGETS.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[numerator], seconds[denominator], strict=True))
        figures.append({"name": name, "ratio": ratio, "budget": budget, "passed": ratio <= budget})
        print(f"{name:30}{ratio:>10.3f}    budget {budget:g}{'' if ratio <= budget else '  OVER'}")
    passed = all(figure["passed"] for figure in figures)
    if args.json:
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(json.dumps({"preset": args.preset, "batch": args.batch, "seconds": medians, "figures": figures}))
    return 0 if passed or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
