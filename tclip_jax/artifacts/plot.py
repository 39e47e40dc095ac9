"""An artifact as a picture: what its bytes are spent on, and the zeros of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tclip_jax.artifacts.inspection import weight_name

_PARTS = ("#3b6fb6", "#8fb3de", "#d1603d")
_WEIGHTS = {"qkv": "#3b6fb6", "out": "#2a9d8f", "fc1": "#d1603d", "fc2": "#e9a03b"}


def plot_inspection(found: Mapping[str, Any]) -> Figure:
    """A figure of what `inspect_artifact` returns."""
    figure = Figure(figsize=(13, 5), layout="constrained", dpi=110)
    sizes, zeros = figure.subplots(1, 2, width_ratios=(1, 1.9))
    plot_sizes(sizes, found)
    plot_zeros(zeros, found)
    return figure


def plot_sizes(axes: Axes, found: Mapping[str, Any]) -> None:
    """A bar for each part of the weight files, in MB (10⁶ bytes)."""
    parts, total = found["bytes"], found["weight_bytes"]
    bars = axes.barh(list(parts), [size / 1e6 for size in parts.values()], color=_PARTS, height=0.6)
    axes.bar_label(bars, [f" {size / 1e6:.3g} MB, {size / total:.0%}" for size in parts.values()], padding=2)
    axes.set(
        title=f"weight files: {total / 1e6:.2f} MB, {found['compression_real']:.2f}x below float32",
        xlabel=f"MB; {found['bits_per_trit']:.3f} bits a trit, entropy {found['entropy']:.3f}",
        xlim=(0, 1.45 * max(parts.values()) / 1e6),
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def plot_zeros(axes: Axes, found: Mapping[str, Any]) -> None:
    """The share of zeros: a line over the layers for each weight of both towers, a level one for a weight of none."""
    for path in dict.fromkeys(row["path"] for row in found["layers"]):
        own, name = [row for row in found["layers"] if row["path"] == path], weight_name(path)
        style = "-" if name.startswith("image") else "--"
        shares = [100 * row["zeros"] for row in own]
        if own[0]["layer"] is None:
            axes.axhline(shares[0], color="#777777", linestyle=":", label=name)
        else:
            axes.plot(shares, style, marker="o", markersize=4, color=_WEIGHTS[name.split()[-1]], label=name)
    axes.set(title=f"zeros: {found['zeros']:.1%} of all trits", xlabel="layer", ylabel="% of the layer's trits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    # At least 4 points high, so that what is chance looks like it.
    low, high = axes.get_ylim()
    missing = max(4 - (high - low), 0) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
