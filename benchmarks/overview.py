"""The picture of the README: size, accuracy and speed, from a finished quick start and `benchmarks.inference`.

tclip quickstart --workdir runs/quickstart
python -m benchmarks.inference --encode-only --json | tail -1 > inference.json
python -m benchmarks.overview --workdir runs/quickstart --inference inference.json --out docs/figures/overview.svg

This script measures nothing. Without --inference it leaves out the times.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLOAT, TERNARY, OTHER = "#9aa5b1", "#d1603d", "#3b6fb6"


def overview(summary: dict[str, Any], encode: dict[str, float] | None) -> Figure:
    """Draw bars for size and accuracy of the quick start's student, and for the time to encode eight images.

    Args:
      summary: the quick start's summary.json.
      encode: a row of `benchmarks.inference`: `baseline_ms` of dense float32, and the speedup of each variant over it.
    """
    figure = Figure(figsize=(10.5, 2.3), layout="constrained")
    axes = figure.subplots(1, 3 if encode else 2)
    size, ratio = summary["artifact_bytes"] / 1e6, summary["compression_real"]
    _bars(
        axes[0],
        {"student, float32": size * ratio, "student, ternary": size},
        "{:.2f} MB",
        f"weights on disk: {ratio:.1f}x smaller",
    )
    accuracy = {"teacher, float32": summary["teacher_accuracy"], "student, ternary": summary["student_accuracy"]}
    percent = {name: 100 * value for name, value in accuracy.items()}
    change = percent["student, ternary"] - percent["teacher, float32"]
    _bars(axes[1], percent, "{:.2f} %", f"zero-shot accuracy, digits: {change:+.2f} points")
    if encode:
        base, packed = (
            encode["baseline_ms"],
            {key: each for key, each in encode.items() if key in ("packed A16", "packed A8")},
        )
        times = {"float32": base, **{f"ternary, {key.split()[1]}": base / each for key, each in packed.items()}}
        _bars(axes[2], times, "{:.0f} ms", "ViT-B/16 on eight images, CPU")
    return figure


def _bars(axes: Axes, values: dict[str, float], form: str, title: str) -> None:
    colors = (FLOAT, TERNARY, OTHER)[: len(values)]
    bars = axes.barh(list(values), list(values.values()), color=colors, height=0.65)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3)
    axes.set(xlim=(0, 1.45 * max(values.values())), xticks=[])
    axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overview", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workdir", default="runs/quickstart", metavar="DIR", help="workdir of a finished `tclip quickstart`"
    )
    parser.add_argument("--inference", type=pathlib.Path, metavar="JSON", help="last line of `benchmarks.inference`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/figures/overview.svg"), metavar="FILE")
    args = parser.parse_args()
    summary = json.loads((pathlib.Path(args.workdir) / "summary.json").read_text())
    encode = json.loads(args.inference.read_text())["encode"][-1] if args.inference else None
    matplotlib.rcParams.update({"svg.hashsalt": "tclip", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    overview(summary, encode).savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None, dpi=80)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
