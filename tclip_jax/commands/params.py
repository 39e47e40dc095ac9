"""Examples:
  tclip params --config ternaryclip --config.mesh.data=16 --config.mesh.fsdp=16
  tclip params --preset ViT-B-16-SigLIP2

The first lists the parameters of a run, and needs no devices of its mesh. The second shows the sizes of a model with
and without ternary weights.
"""

from __future__ import annotations

import argparse
import json
import math

from tclip_jax.commands.train import add_override_arguments
from tclip_jax.recipes import override, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe or the preset, and the table."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="NAME[:ARG]", help="a recipe: the name of a shipped one, or path.py[:ARG]")
    model.add_argument("--preset", metavar="NAME", help="a preset, or an open_clip JSON file: show sizes")
    add_override_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the table, without allocating parameters."""
    import jax

    from tclip_jax.models.clip import param_shapes
    from tclip_jax.models.summary import parameter_rows, parameter_table
    from tclip_jax.parallel.mesh import abstract_mesh
    from tclip_jax.runs.config import run_config

    if args.preset:
        _print_sizes(args)
        return
    # The table does not depend on the teacher, which need not exist.
    run = run_config(resolve(args.config, ["teacher=any", *args.overrides]))
    sizes = (run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    devices = jax.device_count() if -1 in sizes else math.prod(sizes)
    rows = parameter_rows(param_shapes(run.model, run.rules), run.rules, abstract_mesh(devices, *sizes))
    print(json.dumps(rows) if args.json else parameter_table(rows))


def _print_sizes(args: argparse.Namespace) -> None:
    from tclip_jax.models.clip import param_shapes
    from tclip_jax.models.presets import model_cfg
    from tclip_jax.models.summary import size_rows
    from tclip_jax.pages import aligned
    from tclip_jax.runs.config import base_config, run_config

    for key in (each.partition("=")[0] for each in args.overrides):
        if not key.startswith(("model.", "quantizer.")):
            raise ValueError(f"--config.{key} does not change these sizes: with --preset, only model and quantizer do")
    config = base_config()
    config.model = model_cfg(args.preset)
    run = run_config(override(config, args.overrides))
    rows = size_rows(param_shapes(run.model), run.quantizer)
    if args.json:
        print(json.dumps(rows))
        return
    lines = [["weights", "parameters", "quantized", "float32 rest", "float16 rest"]]
    for row in rows:
        sizes = (f"{row[f'float{bits}_bytes'] / 1e6:,.1f} MB" for bits in (32, 16))
        share = f"{row['quantized'] / row['parameters']:.2%}"
        lines.append([row["weights"], f"{row['parameters']:,}", share, *sizes])
    print("\n".join(aligned(lines)))
