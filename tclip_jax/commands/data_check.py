"""Examples:
  tclip data check --data 'wds:/data/cc12m/*.tar'
  tclip data check --data tfds:cc12m@/data/tfds --workers 16 --json
  tclip data check --config my_siglip.py --config.data.source='wds:/data/cc12m/*.tar'

Tokens are those of CLIP, or of the recipe's model with --config, whose data are read if --data is not given.

The exit code is 0 if all samples are good, 1 if a sample is broken, 2 after an error. Duplicate images are reported,
but are not errors.
"""

from __future__ import annotations

import argparse
import json
import os

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import data_run
from tclip_jax.schema import count, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the source, the recipe and the report."""
    parser.add_argument("--data", metavar="SOURCE", help="wds:<pattern>, tfds:<name>, csv:<file>, ...")
    parser.add_argument("--split", help="split of the source, if it has splits (default: train)")
    parser.add_argument(
        "--context-length",
        type=number(int, ge=2),
        metavar="N",
        help="context length of the model in tokens (default: that of the recipe, or 77)",
    )
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--workers", type=count, default=os.cpu_count(), metavar="N", help="worker processes (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the report on a source."""
    from tclip_jax.data.sources import check_split
    from tclip_jax.datasets.check import check, to_json, to_text
    from tclip_jax.training.tokenizer import run_tokenizer

    if not args.data and not args.config:
        raise ValueError("add --data or --config")
    if args.overrides and not args.config:
        raise ValueError("--config.KEY changes a recipe: add --config")
    source, split, length, tokenizer = args.data, args.split, 77, None
    if args.config:
        config = data_run(args.config, args.overrides)
        if not source:
            source, split = config.data.source, split or config.data.split
        length, tokenizer = config.model.text.context_length, run_tokenizer(config)
    if args.split:
        check_split(source, args.split)
    findings = check(source, split or "train", workers=args.workers, tokenizer=tokenizer)
    length = args.context_length or length
    print(json.dumps(to_json(findings, length)) if args.json else to_text(findings, length))
    return 1 if findings.broken else 0
