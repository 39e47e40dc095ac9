"""Example:
  tclip inspect runs/quickstart/artifact --plot artifact.png

Every checksum is checked on the way. MB are 10⁶ bytes.
"""

from __future__ import annotations

import argparse
import io
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The artifact and the form of the report."""
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw sizes and zeros")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Prints sizes, zeros, provenance and figures."""
    from tclip_jax.artifacts.inspection import inspect_artifact, inspection_text, plot_inspection
    from tclip_jax.storage import write_atomic

    found = inspect_artifact(args.artifact)
    if args.plot:
        buffer = io.BytesIO()
        plot_inspection(found).savefig(buffer, format="png")
        write_atomic(args.plot, buffer.getvalue())
    print(json.dumps(found) if args.json else inspection_text(found))
