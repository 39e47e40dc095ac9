"""Example:
  tclip train --config quickstart:teacher --workdir runs/teacher --config.steps=1000

Rerun the same command to resume from the newest checkpoint. The exit code is 0 when training is done; 75 after SIGTERM
and 130 after Ctrl-C, after a checkpoint is saved; 69 if other processes of the run were not found, or one was lost; 2
after an error.
"""

from __future__ import annotations

import argparse

from tclip_jax.recipes import load_recipe, override


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config and its overrides, for commands that read a recipe."""
    parser.add_argument(
        "--config", required=True, metavar="NAME[:ARG]", help="a recipe: the name of a shipped one, or path.py[:ARG]"
    )
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


def run(args: argparse.Namespace) -> None:
    """Train the model, and print the last zero-shot accuracy."""
    import jax

    from tclip_jax.parallel.distributed import distributed
    from tclip_jax.runs.record import read_metrics
    from tclip_jax.training.loop import train

    config = override(load_recipe(args.config), args.overrides)
    with distributed():
        train(config, args.workdir)
        if jax.process_index():
            return
    accuracies = [line["zero_shot_accuracy"] for line in read_metrics(args.workdir) if "zero_shot_accuracy" in line]
    print(f"{args.workdir}: done" + (f", zero-shot accuracy {accuracies[-1]:.2%}" if accuracies else ""))
