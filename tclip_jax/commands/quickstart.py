"""Example:
  tclip quickstart --workdir runs/quickstart

Takes minutes on two CPU cores. Writes summary.json, report.png, artifact/ (packed) and export/ (for PyTorch).
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the output."""
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="DIR", help="folder of the output (default: runs/quickstart)"
    )
    parser.add_argument("--mode", default="", help="'runlocal' for a test that takes seconds and learns nothing")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Run the quick start and print its summary."""
    from tclip_jax.quickstart import quickstart, summary_table

    summary = quickstart(args.workdir, mode=args.mode)
    if args.json:
        print(json.dumps(summary))
        return
    print(summary_table(summary))
    print(f"\nLook at {args.workdir}/report.png; the packed model is {args.workdir}/artifact,")
    print(f"and {args.workdir}/export loads in open_clip and transformers.")
