"""Example:
  tclip params --config ternaryclip --config.mesh.data=16 --config.mesh.fsdp=16

The command needs no devices of the mesh.
"""

from __future__ import annotations

import argparse
import json
import math

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe and the table."""
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the table, without allocating parameters."""
    import jax

    from tclip_jax.models.clip import param_shapes
    from tclip_jax.models.summary import parameter_rows, parameter_table
    from tclip_jax.parallel.mesh import abstract_mesh
    from tclip_jax.runs.config import run_config

    # The table does not depend on the teacher, which need not exist.
    run = run_config(resolve(args.config, ["teacher=any", *args.overrides]))
    sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    devices = jax.device_count() if -1 in sizes else math.prod(sizes)
    rows = parameter_rows(param_shapes(run.model, run.rules), run.rules, abstract_mesh(devices, *sizes))
    print(json.dumps(rows) if args.json else parameter_table(rows))
