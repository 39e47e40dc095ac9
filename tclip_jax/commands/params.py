"""Example:
tclip params --config quickstart:student --config.mesh.fsdp=1
"""

from __future__ import annotations

import argparse
import json

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import load_recipe, override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, and the form of the table."""
    add_config_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Prints the table; allocates no parameters."""
    from tclip_jax.models.clip import param_shapes
    from tclip_jax.models.summary import parameter_rows, parameter_table
    from tclip_jax.parallel.mesh import make_mesh
    from tclip_jax.training.config import run_config

    # The table is the same with any teacher, and none need be trained yet.
    run = run_config(override(load_recipe(args.config), ["teacher=any", *args.overrides]))
    rows = parameter_rows(param_shapes(run.model, run.rules), run.rules, make_mesh(run.mesh.data, run.mesh.fsdp))
    print(json.dumps(rows) if args.json else parameter_table(rows))
