"""Effect of gradients that devices add in bfloat16: `python -m benchmarks.gradient_dtype [--quick] [--json]`.

Trains the student of the quick start with gradients in float32 and, from the same seed, with those that DEVICES devices
of a ring would add with `config.gradient_dtype = "bfloat16"`: each rounds the sum over its rows of the batch, and the
ring rounds after each addition, here also of the patch embedding. The devices are simulated on one, because XLA for
CPUs adds in float32. All else is float32 in both. Prints the differences in the training loss, the mean of the last
tenth of the steps, and in the accuracy on the test images, with 95 % intervals by Student's t over seeds. Finished runs
in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accuracy_results import interval
from tclip_jax.models import layers
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.record import read_metrics
from tclip_jax.schema import count
from tclip_jax.ternary.sums import dense_product
from tclip_jax.training.loop import train

DTYPES = ("float32", "bfloat16")


def rounded(x: jax.Array) -> jax.Array:
    """Round float32 to the values of bfloat16."""
    return jax.lax.reduce_precision(x, 8, 7)


def product_on(devices: int) -> Callable[..., jax.Array]:
    """Return `dense_product` whose gradient of w is the rounded sum of that many devices, for x (B, T, K)."""

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return dense_product(x, w)

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        return product(x, w), (x, w)

    def backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, w = kept
        to_x, to_w = jax.vjp(dense_product, x, w)[1](gradient)
        if x.ndim != 3:  # a projection of pooled embeddings
            return to_x, to_w
        x, gradient = (each.reshape(devices, -1, each.shape[-1]) for each in (x, gradient))
        parts = rounded(jnp.einsum("dtk,dtn->dkn", x, gradient, precision="highest"))
        return to_x, functools.reduce(lambda a, b: rounded(a + b), parts)

    product.defvjp(forward, backward)
    return lambda x, w, gradient_dtype: product(x, w)


def trained(folder: pathlib.Path, who: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train a model of the quick start unless it is trained already, and return its loss and accuracy at the end."""
    config = load_recipe(f"quickstart:{who}{',runlocal' if args.quick else ''}")
    config.seed, config.teacher = seed, "" if who == "teacher" else str(pathlib.Path(args.out) / "teacher")
    train(config, folder)
    lines = read_metrics(folder)
    losses = [line["loss"] for line in lines if "loss" in line]
    accuracy = [line["zero_shot_accuracy"] for line in lines if "zero_shot_accuracy" in line]
    return {"loss": float(np.mean(losses[-max(len(losses) // 10, 1) :])), "accuracy": 100 * accuracy[-1]}


def main() -> int:
    """Print both figures of each dtype and their differences, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_dtype", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/gradient_dtype", metavar="DIR", help="runs (default %(default)s)")
    parser.add_argument("--devices", type=count, default=16, metavar="N", help="simulated devices (default 16)")
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="number of seeds (default 5)")
    parser.add_argument("--quick", action="store_true", help="two seeds, four steps; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.out, args.seeds = f"{args.out}-quick", 2
    rows = load_recipe(f"quickstart:student{',runlocal' if args.quick else ''}").data.batch_size
    if rows % args.devices:
        parser.error(f"--devices {args.devices} does not divide the batch of {rows} pairs")
    out = pathlib.Path(args.out)
    trained(out / "teacher", "teacher", 0, args)
    results: dict[str, list[dict[str, float]]] = {dtype: [] for dtype in DTYPES}
    for seed in range(args.seeds):
        for dtype in DTYPES:
            narrow = dtype == "bfloat16"
            name = f"{dtype}-{args.devices}-{seed}" if narrow else f"{dtype}-{seed}"
            jax.clear_caches()
            with mock.patch.object(layers, "dense_product", product_on(args.devices) if narrow else dense_product):
                results[dtype].append(trained(out / name, "student", seed, args))
    figures: dict[str, Any] = {"devices": args.devices, "seeds": args.seeds}
    for metric in ("loss", "accuracy"):
        values = [[result[metric] for result in results[dtype]] for dtype in DTYPES]
        difference, half = interval([b - a for a, b in zip(*values, strict=True)])
        means = [float(np.mean(each)) for each in values]
        figures[metric] = {**dict(zip(DTYPES, means, strict=True)), "difference": difference, "half": half}
        print(
            f"{metric:10}float32 {means[0]:8.4f}  bfloat16 {means[1]:8.4f}  difference {difference:+.4f} ± {half:.4f}"
        )
    if args.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
