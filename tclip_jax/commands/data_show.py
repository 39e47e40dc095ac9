"""Examples:
  tclip data show --config quickstart:student --out digits.html
  tclip data show --config clip_kd --config.data.source='wds:/data/cc12m/*.tar' --count 128 --out sheet.html

The samples are the first of the run: the same crops, captions and order that `tclip train` begins with.
"""

from __future__ import annotations

import argparse

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import load_recipe, override
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, how many samples, and where the page goes."""
    add_config_arguments(parser)
    parser.add_argument("--count", type=count, default=64, metavar="N", help="samples to show (default: 64)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML page to write")


def run(args: argparse.Namespace) -> None:
    """Draws the samples and writes the page."""
    import dataclasses

    from tclip_jax.datasets.contact_sheet import contact_sheet
    from tclip_jax.runs.config import run_config
    from tclip_jax.storage import write_atomic
    from tclip_jax.training.input import train_data

    config = run_config(override(load_recipe(args.config), ["teacher=any", "data.teacher_cache=", *args.overrides]))
    # One batch of as many samples: their order and their draws do not depend on the size of a batch.
    data = dataclasses.replace(config.data, batch_size=args.count, workers=0)
    batch = next(train_data(dataclasses.replace(config, data=data)))
    facts = [("source", f"{data.source} {data.split}"), ("augmentation", data.augment), ("seed", str(config.seed))]
    write_atomic(args.out, contact_sheet(f"The first {args.count} samples of {args.config}", batch, facts))
    print(f"{args.out}: {args.count} samples of {data.source}, {int((batch['weight'] == 0).sum())} of weight 0")
