"""Examples:
  tclip evaluate compare runs/teacher/eval runs/student/eval --data exports/ --html compare.html
  tclip evaluate compare eval/main eval/branch --max-drop 0.2 --json

A and B are folders that `tclip evaluate --out` wrote; differences are B − A. The exit code is 0 if every data set was
compared, 1 if one was not compared or its metric fell by more than --max-drop, 2 after an error.
"""

from __future__ import annotations

import argparse

from tclip_jax.schema import count, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the two folders and the report."""
    parser.add_argument("a", metavar="A", help="results of the baseline")
    parser.add_argument("b", metavar="B", help="results of the model to compare with it")
    parser.add_argument("--intersect", action="store_true", help="compare only the images that are in both results")
    parser.add_argument("--resamples", type=count, default=2000, help="bootstrap resamples (default: 2000)")
    parser.add_argument("--seed", type=number(int, ge=0), default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--max-drop",
        type=number(float, ge=0),
        metavar="POINTS",
        help="exit with code 1 if a data set drops by more than POINTS",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write a self-contained page with a plot")
    parser.add_argument("--data", metavar="DIR", help="folder of exports, to show images with changed predictions")
    parser.add_argument("--plot", metavar="FILE", help="also write the plot as a PNG")


def run(args: argparse.Namespace) -> int:
    """Print the differences of two results."""
    import io

    from tclip_jax.evaluation.comparison import compare_results
    from tclip_jax.evaluation.comparison_report import flipped, plot_deltas, to_html, to_json, to_text
    from tclip_jax.storage import dump_json, write_atomic

    if args.data and not args.html:
        raise ValueError("--data is for the images of the page: it needs --html FILE")
    if args.resamples < 100:
        raise ValueError(f"--resamples is {args.resamples}: it must be at least 100, to estimate intervals")
    comparison = compare_results(args.a, args.b, intersect=args.intersect, resamples=args.resamples, seed=args.seed)
    if args.html:
        write_atomic(args.html, to_html(comparison, flipped(comparison, args.data)))
    if args.plot:
        picture = io.BytesIO()
        plot_deltas(comparison).savefig(picture, format="png")
        write_atomic(args.plot, picture.getvalue())
    print(dump_json(to_json(comparison)) if args.json else to_text(comparison))
    drops = [-100 * row.deltas[row.metric].delta for row in comparison.rows]
    dropped = args.max_drop is not None and max(drops, default=0) > args.max_drop
    return 1 if comparison.refused or not comparison.rows or dropped else 0
