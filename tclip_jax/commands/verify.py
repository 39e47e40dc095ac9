"""Examples:
  tclip verify runs/quickstart/artifact runs/quickstart/student
  tclip verify runs/quickstart/artifact runs/quickstart/export

Trits and scales are compared bit for bit, other parameters after a cast to the dtype of the artifact. The exit code is
0 if all are equal, 1 if one differs, 2 after an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tclip_jax.models.ternary_rules import TernaryRules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the artifact and its source."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of the artifact to verify")
    parser.add_argument(
        "origin",
        metavar="CHECKPOINT_OR_RUN",
        help="source of the artifact: workdir of a run, another artifact, or a checkpoint of another library",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the differences between an artifact and its source."""
    from etils import epath

    from tclip_jax.artifacts.format import read_artifact
    from tclip_jax.artifacts.manifest import MANIFEST
    from tclip_jax.artifacts.verify import verify_artifact
    from tclip_jax.inference.load import load_model

    if (epath.Path(args.origin) / MANIFEST).exists():
        # An artifact is already packed. Its regexes come from a file, so they are not run.
        config, preprocess, params, *_ = read_artifact(args.origin)
        rules: TernaryRules = ()
    else:
        model = load_model(args.origin)
        config, preprocess, params, rules = model.config, model.preprocess, model.params, model.rules
    outcome = verify_artifact(args.artifact, params, rules, config=config, preprocess=preprocess)
    if args.json:
        print(json.dumps(dataclasses.asdict(outcome)))
    else:
        counts = f"{outcome.trits:,} trits, {outcome.scales:,} scales and {outcome.floats:,} other parameters"
        if outcome.integers:
            counts = f"{outcome.integers:,} integers, {counts}"
        verdict = f"{len(outcome.differences)} differences" if outcome.differences else "all equal"
        print("\n".join([*outcome.differences, f"{args.artifact}: {counts} compared with {args.origin}: {verdict}"]))
    return 1 if outcome.differences else 0
