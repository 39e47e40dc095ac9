"""Examples:
  tclip plan --config ternaryclip:Q-ALL --topology v5e:16x16 --config.data.batch_size=32768 --config.mesh.fsdp=16
  tclip plan --config ternaryclip:Q-ALL --topology v5litepod-256 --sweep batch_size=16384,32768 mesh.fsdp=1,16 --out s
  tclip plan --config ternaryclip:Q-ALL --topology h100:8 --sweep optimizer.name=adamw,adafactor,lion,muon
  tclip plan --against runs/b16

For TPUs the command compiles the training step of `tclip train`, without a TPU and without training. For GPUs
(h100:64) it estimates by formula. --against prints what a run has measured beside its plan, and what the difference
suggests. The exit code is 0; 1 if the run does not fit into memory, or that of --against falls short of its plan; 2
after an error.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import TYPE_CHECKING

from tclip_jax.commands.train import add_config_arguments
from tclip_jax.recipes import override, resolve
from tclip_jax.schema import number

if TYPE_CHECKING:
    import ml_collections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the recipe, the topology and the report."""
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="chips to plan for: a shape (v5e:16x16, v5p:8x8x16), an accelerator type (v5litepod-256), GPUs (h100:64)",
    )
    parser.add_argument(
        "--against",
        metavar="RUN",
        help="workdir of a run: print its measured steps beside the plan of its configuration on its devices",
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
    parser.add_argument(
        "--explain", action="store_true", help="also show what memory contains at its peak: the largest live arrays"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the plan, the sweep and its fastest plan that fits, or a run beside its plan."""
    from tclip_jax.planning.hardware import parse_topology
    from tclip_jax.planning.plan import explain_text, make_plan, plan_text
    from tclip_jax.planning.roofline import EFFICIENCY
    from tclip_jax.storage import cache_folder

    _check(args)
    topology = parse_topology(args.topology) if args.topology else None
    config = _config(args) if args.config else None
    shared = {
        "teacher_preset": args.teacher_preset,
        "price": args.price,
        "efficiency": args.efficiency or EFFICIENCY,
        "cache": args.cache or cache_folder() / "plans",
    }
    if args.against:
        from tclip_jax.planning.against import against_json, against_text, compare
        from tclip_jax.planning.measured import find_topology, measure, read_run

        recorded = read_run(args.against, config)
        measured = measure(recorded)
        plan = make_plan(recorded.planned_config(), find_topology(recorded, topology), **shared)
        findings = compare(recorded, measured, plan)
        show = against_json if args.json else against_text
        shown = show(recorded, measured, plan, findings)
        print(json.dumps(shown) if args.json else shown)
        return int(any(each.falls_short for each in findings))
    if config is None or topology is None:
        raise ValueError("a plan needs --config and --topology, or --against with the workdir of a run")
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
    if args.explain and not args.json:
        print("\n" + explain_text(plan))
    return int(not plan.fits)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    if args.out and not args.sweep:
        raise ValueError("--out is the folder of a sweep: it needs --sweep; --json prints one plan as JSON")
    if args.explain and args.sweep:
        raise ValueError("--explain describes one plan: leave out --sweep")
    if args.against and (args.sweep or args.explain):
        raise ValueError("--against describes a run: leave out --sweep and --explain")
    if args.overrides and not args.config:
        raise ValueError("--config.KEY changes a recipe: it needs --config")


def _config(args: argparse.Namespace) -> ml_collections.ConfigDict:
    config = resolve(args.config, args.overrides, teacher_may_miss=bool(args.teacher_preset))
    if not config.teacher and not config.data.teacher_cache:
        config.teacher = args.teacher_preset or ""
    return config
