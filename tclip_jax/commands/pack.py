"""Examples:
  tclip pack runs/student --out artifact
  tclip pack runs/student@best --out best
  tclip pack runs/student@average --out average

WORKDIR@best is the best of the saved steps by `config.checkpoint.best_metric`, WORKDIR@1200 that of step 1200. With
`config.optimizer.ema_decay`, WORKDIR@average is the average of the weights, also WORKDIR@best-average and
WORKDIR@1200-average.
"""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run and where to write."""
    parser.add_argument(
        "run", metavar="WORKDIR", help="workdir of a run, its newest step; or WORKDIR@best, @STEP, @average"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the artifact, a new folder")
    parser.add_argument(
        "--rest", choices=("float16", "float32"), default="float16", help="dtype of the float parameters"
    )
    parser.add_argument(
        "--figures",
        metavar="FILE.json",
        help="measurements to keep with the model beside those of the run, a JSON object",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact that is there")


def run(args: argparse.Namespace) -> None:
    """Packs, and prints what it saved."""
    from etils import epath

    from tclip_jax.artifacts.format import write_artifact
    from tclip_jax.artifacts.inspection import compression_real, ternary_share, weight_bytes, zero_share
    from tclip_jax.artifacts.manifest import MANIFEST
    from tclip_jax.artifacts.pack import pack_params
    from tclip_jax.inference.load import load_run
    from tclip_jax.runs.read import split_step
    from tclip_jax.runs.record import run_figures, run_provenance

    if (epath.Path(args.run) / MANIFEST).exists():
        raise ValueError(f"{args.run} is packed already: expected the workdir of `tclip train`")
    figures = _read_figures(args.figures) if args.figures else {}
    step, model = load_run(args.run)
    workdir, _, average = split_step(args.run)
    params = pack_params(model.params, model.rules)
    write_artifact(
        args.out,
        config=model.config,
        preprocess=model.preprocess,
        params=params,
        rules=model.rules,
        rest_dtype=args.rest,
        figures=run_figures(workdir, step, average=average) | figures,
        provenance=run_provenance(workdir, step, average=average),
        overwrite=args.overwrite,
    )
    saved = f"{weight_bytes(args.out):,} bytes of weights, {compression_real(params, args.out):.2f}x below float32"
    print(f"{args.out}: {saved}; {ternary_share(params):.2%} ternary, {zero_share(params):.1%} of the trits zero")


def _read_figures(path: str) -> dict[str, Any]:
    from etils import epath

    try:
        figures = json.loads(epath.Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(figures, dict):
        raise ValueError(f"{path} holds {type(figures).__name__}: it must be one JSON object")
    return figures
