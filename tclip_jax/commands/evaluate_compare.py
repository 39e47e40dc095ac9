"""Examples:
  tclip evaluate compare runs/teacher/eval runs/student/eval --data exports/ --html compare.html
  tclip evaluate compare eval/main eval/branch --max-drop 0.2 --json

A and B: folders that `tclip evaluate --out` wrote; B − A is what B gains. The exit code is 0 if every data set was
compared, 1 if one could not be or, with --max-drop, fell too far, 2 after an error.
"""

from __future__ import annotations

import argparse

from tclip_jax.schema import count, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two folders, and the form of the report."""
    parser.add_argument("a", metavar="A", help="results of the model to compare with")
    parser.add_argument("b", metavar="B", help="results of the other model")
    parser.add_argument("--intersect", action="store_true", help="compare the images of both where they differ")
    parser.add_argument("--resamples", type=count, default=2000, help="of the bootstrap (default: 2000)")
    parser.add_argument("--seed", type=number(int, ge=0), default=0, help="of the bootstrap (default: 0)")
    parser.add_argument(
        "--max-drop", type=number(float, ge=0), metavar="POINTS", help="exit with 1 if a data set falls further"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write one self-contained page with a plot")
    parser.add_argument("--data", metavar="DIR", help="the exports, for images that changed on the page")
    parser.add_argument("--plot", metavar="FILE", help="also write the plot as a PNG")


def run(args: argparse.Namespace) -> int:
    """Compares, prints, and returns the exit code."""
    import io

    from tclip_jax.evaluation.comparison import compare_results
    from tclip_jax.evaluation.comparison_report import flipped, plot_deltas, to_html, to_json, to_text
    from tclip_jax.storage import dump_json, write_atomic

    if args.data and not args.html:
        raise ValueError("--data is for the images of the page: it needs --html FILE")
    if args.resamples < 100:
        raise ValueError(f"--resamples is {args.resamples}: it must be 100 or more for the ends of an interval")
    found = compare_results(args.a, args.b, intersect=args.intersect, resamples=args.resamples, seed=args.seed)
    if args.html:
        write_atomic(args.html, to_html(found, flipped(found, args.data)))
    if args.plot:
        picture = io.BytesIO()
        plot_deltas(found).savefig(picture, format="png")
        write_atomic(args.plot, picture.getvalue())
    print(dump_json(to_json(found)) if args.json else to_text(found))
    drops = [-100 * row.deltas[row.metric].delta for row in found.rows]
    fell = args.max_drop is not None and max(drops, default=0) > args.max_drop
    return 1 if found.refused or not found.rows or fell else 0
