"""Examples:
  tclip data prepare --data 'wds:/data/cc12m/{00000..01242}.tar' --name cc12m --out /data/tfds --workers 16
  tclip data prepare --data 'wds:gs://b/cc12m/*.tar' --name cc12m --out gs://b/tfds --beam="--runner=DataflowRunner"

Each tar becomes one file. Train on the data set as `tfds:cc12m@/data/tfds`, or on its files as `arrayrecord:PATTERN`.
Rerun the same command to resume. Bad samples are dropped and counted by kind; the others are copied unchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os

from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the source, the data set to write, and the processes."""
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="wds:<pattern>, or another source with captions"
    )
    parser.add_argument("--split", default="train", help="split of the source and of the data set (default: train)")
    parser.add_argument("--name", required=True, help="name of the data set: lower-case letters, digits, underscores")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of data sets, local or gs://")
    parser.add_argument(
        "--file-samples",
        type=count,
        metavar="N",
        help="samples per file, for sources other than tars (default: 10,000)",
    )
    parser.add_argument("--workers", type=count, metavar="N", help="worker processes (default: all cores)")
    parser.add_argument("--beam", metavar="OPTIONS", help="run as an Apache Beam pipeline with these options")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Write the data set, and print the numbers of samples kept and dropped."""
    import shlex

    from tclip_jax.datasets.prepare import begin, plan, prepare, prepare_with_beam
    from tclip_jax.pages import aligned

    if args.workers and args.beam is not None:
        raise ValueError("--workers is for this machine: set the workers of a Beam pipeline by its options in --beam")
    if args.file_samples and args.data.startswith("wds:"):
        raise ValueError("--file-samples is for other sources: each tar becomes one file")
    parts = plan(args.data, args.split, args.file_samples or 10_000)
    target = begin(args.out, args.name, args.split, parts)
    if args.beam is None:
        outcome = prepare(target, parts, workers=args.workers or os.cpu_count() or 1)
    else:
        outcome = prepare_with_beam(target, parts, shlex.split(args.beam))
    if args.json:
        print(json.dumps(dataclasses.asdict(outcome) | {"folder": target.folder, "files": target.files}))
        return
    rows = [["samples", f"{outcome.samples:,}"], ["kept", f"{outcome.kept:,}"]]
    rows += [[f"dropped: {kind}", f"{number:,}"] for kind, number in outcome.dropped.items()]
    lines = [*aligned(rows), *(f"  {kind}: {reason}" for kind, reason in outcome.examples), *outcome.notes]
    size = f"{outcome.file_bytes / 2**30:.1f} GiB in {target.files:,} files"
    print(
        "\n".join([*lines, "", f"{target.folder}: {size}; train on --config.data.source=tfds:{args.name}@{args.out}"])
    )
