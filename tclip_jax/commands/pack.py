"""Examples:
  tclip pack runs/student --out artifact
  tclip pack runs/student@best --out best
  tclip pack runs/student@average --out average

WORKDIR is the newest saved step of a run, WORKDIR@1200 step 1200, WORKDIR@best the best saved step by
`config.checkpoint.best_metric`. With `config.optimizer.ema_decay`, WORKDIR@average, WORKDIR@1200-average and
WORKDIR@best-average are the moving averages of the weights at these steps.
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the run and the artifact."""
    parser.add_argument(
        "run", metavar="WORKDIR", help="workdir of a run; or WORKDIR@best, WORKDIR@STEP, WORKDIR@average"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the artifact, a new folder")
    parser.add_argument(
        "--rest", choices=("float16", "float32"), default="float16", help="dtype of the float parameters"
    )
    parser.add_argument(
        "--figures",
        metavar="FILE.json",
        help="file with a JSON object of measurements, to store with those of the run",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing artifact")


def run(args: argparse.Namespace) -> None:
    """Write the artifact, and print its size and compression."""
    from etils import epath

    from tclip_jax.artifacts.format import write_artifact
    from tclip_jax.artifacts.inspection import compression_real, ternary_share, uniform_share, weight_bytes, zero_share
    from tclip_jax.artifacts.manifest import MANIFEST
    from tclip_jax.artifacts.pack import pack_params
    from tclip_jax.inference.load import load_run
    from tclip_jax.interop.checkpoints import is_checkpoint
    from tclip_jax.runs.read import split_step
    from tclip_jax.runs.record import run_figures, run_provenance

    if (epath.Path(args.run) / MANIFEST).exists():
        raise ValueError(f"{args.run} is an artifact, already packed: expected the workdir of `tclip train`")
    if is_checkpoint(args.run):
        raise ValueError(f"{args.run} is a checkpoint of another library: `tclip import` makes an artifact of it")
    figures = _read_figures(args.figures) if args.figures else {}
    step, model = load_run(args.run)
    workdir, _, average = split_step(args.run)
    params = pack_params(model.params, model.rules)
    write_artifact(
        args.out,
        config=model.config,
        preprocess=model.preprocess,
        params=params,
        tokenizer=model.tokenizer,
        rules=model.rules,
        rest_dtype=args.rest,
        figures=run_figures(workdir, step, average=average) | figures,
        provenance=run_provenance(workdir, step, average=average),
        overwrite=args.overwrite,
    )
    saved = f"{weight_bytes(args.out):,} bytes of weights, {compression_real(params, args.out):.2f}x below float32"
    shares = f"{ternary_share(params):.2%} ternary, {zero_share(params):.1%} of the trits zero"
    if uniform := uniform_share(params):
        shares += f"; {uniform:.2%} of 4 or 8 bits"
    print(f"{args.out}: {saved}; {shares}")


def _read_figures(path: str) -> dict[str, Any]:
    from etils import epath

    try:
        figures = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(figures, dict):
        raise ValueError(f"{path} holds {type(figures).__name__}: it must hold one JSON object")
    return figures
