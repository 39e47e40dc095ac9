"""Examples:
  tclip plan --config ternaryclip:Q-ALL --topology v5e:16x16 --config.data.batch_size=32768 --config.mesh.fsdp=16
  tclip plan --config ternaryclip:Q-ALL --topology v5litepod-256 --sweep batch_size=16384,32768 mesh.fsdp=1,16 --out s
  tclip plan --config ternaryclip:Q-ALL --topology h100:8 --sweep optimizer.name=adamw,adafactor,lion,muon

For TPUs the command compiles the training step of `tclip train`, without a TPU and without training. For GPUs
(h100:64) it estimates by formula. The exit code is 0 if the run fits into memory, 1 if not, 2 after an error.
"""

from __future__ import annotations

import argparse
import copy
import json

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import override, resolve
from tclip_jax.schema import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe, the topology and the report."""
    add_config_arguments(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="chips to plan for: a shape (v5e:16x16, v5p:8x8x16), an accelerator type (v5litepod-256), GPUs (h100:64)",
    )
    parser.add_argument(
        "--teacher-preset", default="", metavar="NAME", help="architecture of the teacher, such as ViT-L-14"
    )
    parser.add_argument(
        "--price", type=number(float, ge=0), metavar="X", help="price of a chip-hour, to estimate the cost"
    )
    parser.add_argument(
        "--efficiency",
        type=number(float, gt=0, le=1),
        metavar="X",
        help="fraction of the peak rate that matrix products reach at the slow end of the estimate (default: 0.5)",
    )
    parser.add_argument("--cache", metavar="DIR", help="folder of compiled plans (default: $TCLIP_CACHE_DIR/plans)")
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=A,B",
        help="plan every combination: batch_size=A,B, mesh.fsdp=1,16, remat=True,False, optimizer.name=adamw,lion",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for sweep.json and sweep.html of a sweep")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan, or the sweep and its fastest plan that fits."""
    from tclip_jax.planning.hardware import parse_topology
    from tclip_jax.planning.plan import make_plan, plan_text
    from tclip_jax.planning.roofline import EFFICIENCY
    from tclip_jax.storage import cache_folder

    if args.out and not args.sweep:
        raise ValueError("--out is the folder of a sweep: it needs --sweep; --json prints one plan as JSON")
    topology = parse_topology(args.topology)
    config = resolve(args.config, args.overrides, teacher_may_miss=bool(args.teacher_preset))
    if not config.teacher:
        config.teacher = args.teacher_preset or ""
    shared = {
        "teacher_preset": args.teacher_preset,
        "price": args.price,
        "efficiency": args.efficiency or EFFICIENCY,
        "cache": args.cache or cache_folder() / "plans",
    }
    if args.sweep:
        from tclip_jax.planning.sweep import best, parse_grid, run_sweep, sweep_text, write_sweep

        grid = parse_grid(args.sweep)
        configs = [override(copy.deepcopy(config), map("=".join, changes.items())) for changes in grid]
        points = run_sweep(list(zip(grid, configs, strict=True)), topology, **shared)
        if args.out:
            write_sweep(args.out, points)
        print(json.dumps([point.to_json() for point in points]) if args.json else sweep_text(points))
        return int(best(points) is None)
    plan = make_plan(config, topology, **shared)
    print(json.dumps(plan.to_json()) if args.json else plan_text(plan))
    return int(not plan.fits)
