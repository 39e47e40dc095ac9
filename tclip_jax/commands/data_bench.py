"""Examples:
  tclip data bench --config ternaryclip --config.data.source='wds:/data/cc12m/*.tar' --workers 0 4 8 16
  tclip data bench --config quickstart:student --step-seconds 0.1 --json

Columns: `per core` is images per second of CPU time, which other load on the machine hardly changes; `wait` is the
fraction of time that steps of --step-seconds wait for their batch; `memory` is the peak of all processes together. The
first batch takes longer when the source is indexed for the first time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import data_run
from tclip_jax.schema import number

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe and the measurement."""
    add_config_arguments(parser)
    parser.add_argument(
        "--workers",
        type=number(int, ge=0),
        nargs="+",
        metavar="N",
        help="numbers of worker processes to measure (default: the recipe's)",
    )
    parser.add_argument(
        "--seconds", type=number(float, gt=0), default=10.0, help="duration of each measurement (default: 10)"
    )
    parser.add_argument(
        "--step-seconds",
        type=number(float, ge=0),
        default=0.0,
        help="duration of a simulated training step, to measure waits",
    )
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Print the speed of the input pipeline for each number of workers."""
    import sys

    import tqdm

    from tclip_jax.data.bad_samples import format_counts
    from tclip_jax.datasets.bench import measure
    from tclip_jax.pages import aligned

    config = data_run(args.config, args.overrides)
    speeds = [
        measure(config, workers, seconds=args.seconds, step_seconds=args.step_seconds)
        for workers in tqdm.tqdm(args.workers or [config.data.workers], desc="bench", disable=not sys.stderr.isatty())
    ]
    for speed in speeds:
        if speed.bad:
            kinds = format_counts(speed.bad)
            _logger.warning("%d workers: bad samples: %s; `tclip data check` gives reasons", speed.workers, kinds)
    if args.json:
        print(json.dumps([dataclasses.asdict(speed) for speed in speeds]))
        return
    rows = [["workers", "images/s", "per core", "wait", "first batch, s", "memory, GiB", "weight 0"]]
    for speed in speeds:
        wait = "–" if speed.wait_share is None else f"{speed.wait_share:.1%}"
        memory = "–" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**30:.2f}"
        per_core = "–" if speed.images_per_core_second is None else f"{speed.images_per_core_second:,.0f}"
        figures = (f"{speed.images_per_second:,.0f}", per_core, wait, f"{speed.first_seconds:.1f}", memory)
        rows.append([str(speed.workers), *figures, f"{speed.weightless:.2%}"])
    print("\n".join(aligned(rows)))
