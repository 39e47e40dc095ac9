"""Examples:
  tclip verify runs/quickstart/artifact runs/quickstart/student
  tclip verify runs/quickstart/artifact runs/quickstart/export

Trits and scales are compared bit for bit, the other parameters after the artifact's cast to float16 or float32. The
exit code is 0 if all are the same, 1 if something differs, 2 after an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tclip_jax.models.ternary_rules import TernaryRules


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The artifact and what it was made from."""
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument(
        "origin",
        metavar="CHECKPOINT_OR_RUN",
        help="workdir of a run (its newest checkpoint), another artifact, or a checkpoint of another library",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Compares, prints what differs, and returns the exit code."""
    from etils import epath

    from tclip_jax.artifacts.format import read_artifact
    from tclip_jax.artifacts.manifest import MANIFEST
    from tclip_jax.artifacts.verify import verify_artifact
    from tclip_jax.inference.load import load_model

    if (epath.Path(args.origin) / MANIFEST).exists():
        # Packed already: its rules are a record, and a stranger's regexes are not run.
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
        verdict = f"{len(outcome.differences)} differences" if outcome.differences else "all the same"
        print("\n".join([*outcome.differences, f"{args.artifact}: {counts} compared with {args.origin}: {verdict}"]))
    return 1 if outcome.differences else 0
