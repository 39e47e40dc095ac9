"""Examples:
  tclip train --config quickstart:teacher --workdir runs/teacher --config.steps=1000
  tclip train --config my_recipe.py --workdir gs://bucket/run --check

Rerun the same command to resume from the newest checkpoint. The exit code is 0 when training is done; 75 after SIGTERM
and 130 after Ctrl-C, after a checkpoint is saved; 69 if other processes of the run were not found, or one was lost; 2
after an error.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from tclip_jax.recipes import resolve

if TYPE_CHECKING:
    import ml_collections


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --config and its overrides, for commands that read a recipe."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="NAME[:ARG]",
        help="a recipe: the name of a shipped one, or path.py[:ARG]",
    )
    add_override_arguments(parser)


def add_override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of a recipe."""
    parser.add_argument(
        "--config.KEY",
        dest="overrides",
        action="append",
        default=[],
        metavar="VALUE",
        help="set a key of the recipe, such as --config.optimizer.learning_rate=1e-3",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe and the workdir."""
    add_config_arguments(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run, local or gs://")
    parser.add_argument(
        "--check",
        action="store_true",
        help="open all that the run needs, read a batch, estimate the memory; train and write nothing",
    )


def run(args: argparse.Namespace) -> None:
    """Train the model and print the last zero-shot accuracy, or only check the run."""
    import jax

    from tclip_jax.parallel.distributed import distributed
    from tclip_jax.runs.record import read_metrics
    from tclip_jax.training.loop import train

    config = resolve(args.config, args.overrides)
    with distributed():
        if args.check:
            print("\n".join(_checked(config, args.workdir)))
            return
        train(config, args.workdir)
        if jax.process_index():
            return
    accuracies = [line["zero_shot_accuracy"] for line in read_metrics(args.workdir) if "zero_shot_accuracy" in line]
    print(f"{args.workdir}: done" + (f", zero-shot accuracy {accuracies[-1]:.2%}" if accuracies else ""))


def _checked(config: ml_collections.ConfigDict, workdir: str) -> list[str]:
    """Open everything that a run uses, read a batch, and return lines that describe the run."""
    import jax
    import numpy as np

    from tclip_jax.models.clip import param_shapes
    from tclip_jax.planning.estimate import formula_memory
    from tclip_jax.training.session import prepare

    prepared = prepare(config, workdir)
    run, build = prepared.run, prepared.build
    with jax.set_mesh(prepared.mesh), contextlib.closing(prepared.data):
        batch = next(prepared.data)
        usable = int(np.sum([np.sum(np.asarray(shard.data) > 0) for shard in batch["weight"].addressable_shards]))
        memory = formula_memory(build)
        student = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(run.model, run.rules)))
    limit = (prepared.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", 0)
    needed, gib = memory.total, 2**30
    if limit and needed > limit:
        raise ValueError(f"the run needs {needed / gib:.1f} GiB on a device of {limit / gib:.1f} GiB: see `tclip plan`")
    resumed = f"resumes from step {prepared.first_step}" if prepared.first_step else "a new run"
    lines = [
        f"data         {run.data.source} {run.data.split}: {usable} samples of this process's first batch are usable",
        f"student      {student / 1e6:,.1f} M parameters, ternary: {run.ternary if run.rules else 'none'}",
        f"teacher      {run.teacher or run.data.teacher_cache or 'none'}",
        *(f"evaluation   {each.suite or each.source} {each.split}" for each in (run.eval, *run.evals) if each.source),
        f"memory       {needed / gib:.2f} GiB on each device, of which activations and gradients by formula"
        + (f"; it has {limit / gib:.1f} GiB" if limit else ""),
        f"workdir      {workdir}: {resumed}",
    ]
    return [*lines, "checked: nothing was trained or written"]
