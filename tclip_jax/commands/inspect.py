"""Examples:
  tclip inspect runs/quickstart/artifact --plot artifact.png
  tclip inspect runs/quickstart/artifact --runtime

The command also verifies every checksum. 1 MB is 10⁶ bytes.
"""

from __future__ import annotations

import argparse
import io
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the artifact and the report."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of an artifact")
    parser.add_argument(
        "--runtime", action="store_true", help="what computes the model on this machine, and why; instead of sizes"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="also write a plot of sizes and zeros")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    """Print sizes, zeros, provenance and figures of an artifact."""
    from tclip_jax.artifacts.format import read_artifact
    from tclip_jax.artifacts.inspection import inspect_artifact, inspection_text, plot_inspection
    from tclip_jax.inference.runtime import inspect_runtime, runtime_text
    from tclip_jax.storage import write_atomic

    if args.runtime:
        if args.plot:
            raise ValueError("--plot is of sizes and zeros: use it without --runtime")
        artifact = read_artifact(args.artifact)
        runtime = inspect_runtime(artifact.config, artifact.params)
        print(json.dumps(runtime) if args.json else runtime_text(runtime))
        return
    inspection = inspect_artifact(args.artifact)
    if args.plot:
        buffer = io.BytesIO()
        plot_inspection(inspection).savefig(buffer, format="png")
        write_atomic(args.plot, buffer.getvalue())
    print(json.dumps(inspection) if args.json else inspection_text(inspection))
