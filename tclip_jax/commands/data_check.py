"""Examples:
  tclip data check --data 'wds:/data/cc12m/*.tar'
  tclip data check --data tfds:cc12m@/data/tfds --workers 16 --json

The exit code is 0 if all samples are good, 1 if a sample is broken, 2 after an error. Duplicate images are reported,
but are not errors.
"""

from __future__ import annotations

import argparse
import json
import os

from tclip_jax.schema import count, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the source and the report."""
    parser.add_argument("--data", required=True, metavar="SOURCE", help="wds:<pattern>, tfds:<name>, csv:<file>, ...")
    parser.add_argument("--split", help="split of the source, if it has splits (default: train)")
    parser.add_argument(
        "--context-length",
        type=number(int, ge=2),
        default=77,
        metavar="N",
        help="context length of the model in tokens (default: 77)",
    )
    parser.add_argument(
        "--workers", type=count, default=os.cpu_count(), metavar="N", help="worker processes (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the report on a source."""
    from tclip_jax.data.sources import check_split
    from tclip_jax.datasets.check import check, to_json, to_text

    if args.split:
        check_split(args.data, args.split)
    findings = check(args.data, args.split or "train", workers=args.workers)
    print(json.dumps(to_json(findings, args.context_length)) if args.json else to_text(findings, args.context_length))
    return 1 if findings.broken else 0
