"""Examples:
  tclip data show --config quickstart:student --out digits.html
  tclip data show --config clip_kd --config.data.source='wds:/data/cc12m/*.tar' --count 128 --out sheet.html

The page shows the first samples of the run, with the crops, captions and order of `tclip train`, and why a sample is
bad.
"""

from __future__ import annotations

import argparse

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import data_run
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe, the number of samples and the page."""
    add_config_arguments(parser)
    parser.add_argument("--count", type=count, default=64, metavar="N", help="number of samples (default: 64)")
    parser.add_argument("--out", required=True, metavar="FILE", help="the HTML page to write")


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    import dataclasses

    from tclip_jax.datasets.contact_sheet import contact_sheet
    from tclip_jax.storage import write_atomic
    from tclip_jax.training.input import train_data
    from tclip_jax.training.tokenizer import run_tokenizer

    config = data_run(args.config, args.overrides)
    # One batch of `count` samples: their order and augmentation do not depend on the batch size.
    data = dataclasses.replace(config.data, batch_size=args.count, workers=0)
    tokenizer = run_tokenizer(config)
    rows = train_data(dataclasses.replace(config, data=data), tokenizer=tokenizer)
    batch = next(rows)
    names, reasons = (
        [each.decode("utf-8", "replace") for each in part.tolist()] for part in (rows.names, rows.reasons)
    )
    facts = [("source", f"{data.source} {data.split}"), ("augmentation", data.augment), ("seed", str(config.seed))]
    title = f"The first {args.count} samples of {args.config}"
    write_atomic(args.out, contact_sheet(title, batch, names, reasons, facts, tokenizer))
    print(f"{args.out}: {args.count} samples of {data.source}, {int((batch['weight'] == 0).sum())} of them bad")
