"""The picture of the README: size, accuracy and speed, from a finished quick start and `benchmarks.runtimes`.

tclip quickstart --workdir runs/quickstart
python -m benchmarks.runtimes --json | tail -1 > runtimes.json
python -m benchmarks.overview --workdir runs/quickstart --runtimes runtimes.json --out docs/figures/overview.svg

This script measures nothing. Without --runtimes it leaves out the times. Of the float32 runtimes it shows the fastest.
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


def overview(summary: dict[str, Any], times: dict[str, float] | None) -> Figure:
    """Draw bars for size and accuracy of the quick start's student, and for the time to encode eight images.

    Args:
      summary: the quick start's summary.json.
      times: milliseconds by runtime, of which the fastest is in float32; see `fastest`.
    """
    figure = Figure(figsize=(10.5, 2.3), layout="constrained")
    axes = figure.subplots(1, 3 if times else 2)
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
    if times:
        _bars(axes[2], times, "{:.0f} ms", "ViT-B/16 on eight images, CPU")
    return figure


def fastest(runtimes: dict[str, Any]) -> dict[str, float]:
    """Return the least milliseconds of the fastest float32 runtime, of A16 and of A8, at the largest batch.

    Args:
      runtimes: the JSON of `benchmarks.runtimes`.
    """
    batch = max(row["batch"] for row in runtimes["rows"])
    rows = {row["runtime"]: row["least_ms"] for row in runtimes["rows"] if row["batch"] == batch}
    name = min((name for name in rows if "float32" in name), key=rows.__getitem__)
    return {name: rows[name], **{f"ternary, {each}": rows[f"tclip_jax {each}"] for each in ("A16", "A8")}}


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
    parser.add_argument("--runtimes", type=pathlib.Path, metavar="JSON", help="last line of `benchmarks.runtimes`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/figures/overview.svg"), metavar="FILE")
    args = parser.parse_args()
    summary = json.loads((pathlib.Path(args.workdir) / "summary.json").read_text())
    times = fastest(json.loads(args.runtimes.read_text())) if args.runtimes else None
    matplotlib.rcParams.update({"svg.hashsalt": "tclip", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    overview(summary, times).savefig(args.out, metadata={"Date": None} if args.out.suffix == ".svg" else None, dpi=80)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
