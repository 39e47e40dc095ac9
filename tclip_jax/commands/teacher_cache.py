"""Examples:
  tclip teacher-cache --config quickstart:student --teacher runs/teacher --copies 4 --out caches/digits
  tclip train --config quickstart:student --config.data.teacher_cache=caches/digits --workdir runs/student

Rerun the same command to resume.
"""

from __future__ import annotations

import argparse

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import resolve
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe, the teacher and the cache."""
    add_config_arguments(parser)
    parser.add_argument("--teacher", required=True, metavar="PATH", help="workdir, artifact or open_clip checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the cache, local or gs://")
    parser.add_argument(
        "--copies", type=count, default=1, metavar="N", help="augmentations of each sample (default: 1)"
    )
    parser.add_argument("--batch-size", type=count, default=128, metavar="N", help="images per batch (default: 128)")


def run(args: argparse.Namespace) -> None:
    """Write the cache, and print its size."""
    import jax

    from tclip_jax.parallel.distributed import distributed
    from tclip_jax.runs.config import run_config
    from tclip_jax.training.teacher_cache import write_cache

    # --teacher replaces the teacher and the cache of the recipe.
    config = resolve(args.config, ["teacher=any", "data.teacher_cache=", *args.overrides])
    with distributed():
        cache = write_cache(args.out, run_config(config), args.teacher, copies=args.copies, batch_size=args.batch_size)
        if jax.process_index():
            return
    print(f"{args.out}: {cache.samples:,} samples x {cache.copies} copies, {cache.embed_dim} wide, {cache.files} files")
