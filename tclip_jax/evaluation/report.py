"""One picture of a run: how it learned, what its trits look like, and what it says of test images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclip_jax.artifacts.inspection import weight_name
from tclip_jax.artifacts.pack import flatten
from tclip_jax.models.trits import HISTOGRAM_EDGES
from tclip_jax.storage import write_atomic
from tclip_jax.ternary import TernaryTensor

Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # run -> lines of its metrics.jsonl
_COLORS = {-1: "#3b6fb6", 0: "#d9d9d9", 1: "#d1603d"}


def write_report(
    path: epath.PathLike,
    *,
    curves: Curves,
    params: Mapping[str, Any],
    images: Sequence[npt.NDArray[np.uint8]],
    said: Sequence[str],
    correct: Sequence[bool],
) -> None:
    """Writes a PNG.

    Args:
      curves: for each run the lines of its metrics.
      params: a packed parameter tree.
      images: pixels (H, W, 3) of test images.
      said: the caption that the model gave to each.
      correct: whether it was right.
    """
    # Of the last run that has any: others may have other weights.
    looks = max(
        ([line for line in lines if "trits" in line] for lines in reversed([*curves.values()])), key=bool, default=[]
    )
    figure = Figure(figsize=(15, 13 if looks else 9), layout="constrained", dpi=110)
    heights = (1, 0.8, 1.1) if looks else (1, 1.1)
    top, *middle, bottom = np.asarray(figure.subfigures(len(heights), 1, height_ratios=heights))
    loss, accuracy, trits = top.subplots(1, 3, width_ratios=(1, 1, 1.5))
    plot_curves(loss, curves, "loss/task", "contrastive loss")
    plot_curves(accuracy, curves, "zero_shot_accuracy", "zero-shot accuracy")
    plot_trits(trits, params)
    if looks:
        plot_dynamics(middle[0].subplots(1, 5), looks)
    plot_predictions(bottom, images, said, correct)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def plot_curves(axes: Axes, curves: Curves, metric: str, title: str) -> None:
    """One line per run over the steps; accuracies in per cent."""
    share = metric.endswith("accuracy")
    for name, lines in curves.items():
        points = [(line["step"], line[metric] * (100 if share else 1)) for line in lines if metric in line]
        if points:
            last = f" {points[-1][1]:.1f} %" if share else ""
            axes.plot(*zip(*points, strict=True), label=f"{name}{last}", marker="o" if share else None, markersize=3)
    axes.set(title=title, xlabel="step", ylabel="%" if share else None)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def plot_dynamics(axes: npt.NDArray[Any], looks: Sequence[Mapping[str, Any]]) -> None:
    """How trits moved while one run learned, a line per weight: zeros, flips and drift, saturation, |w| at the end.

    Args:
      axes: five of them.
      looks: lines of metrics.jsonl with "trits", whose values have one entry per layer; their mean is drawn.
    """
    titles = {
        "zeros": "zeros, %",
        "flips": "trits that flip in one step, %",
        "drift": "change of scales in one step, %",
        "saturated": "latent weights beyond s, %",
    }
    for each, (name, title) in zip(axes, titles.items(), strict=False):
        for path in looks[-1]["trits"]:
            points = [(look["step"], 100 * np.mean(look["trits"][path][name])) for look in looks]
            each.plot(*zip(*points, strict=True), label=weight_name(path), marker="o", markersize=3)
        each.set(title=title, xlabel="step")
        each.grid(alpha=0.3)
    for path, look in looks[-1]["trits"].items():
        axes[-1].stairs(np.mean(look["histogram"], axis=0)[:-1], HISTOGRAM_EDGES, label=weight_name(path))
    axes[-1].set(title="|w| / s at the end, shares", xlabel="|w| / s")
    axes[-1].axvline(0.5, color="grey", linewidth=0.8)  # the threshold of most quantizers
    axes[-1].legend(frameon=False, fontsize=6)


def plot_trits(axes: Axes, params: Mapping[str, Any]) -> None:
    """Shares of −1, 0 and +1 in every ternary weight of every layer, as stacked bars."""
    shares = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, TernaryTensor):
            tower, _, weight = weight_name(path).partition(" ")
            trits, stacked = np.asarray(leaf.trits), len(leaf.shape) == 3
            for layer, each in enumerate(trits if stacked else [trits]):
                label = f"{tower} {layer} {weight}" if stacked else f"{tower} {weight}"
                shares[label] = {trit: 100 * float(np.mean(each == trit)) for trit in (-1, 0, 1)}
    left = np.zeros(len(shares))
    for trit, color in _COLORS.items():
        widths = np.array([share[trit] for share in shares.values()])
        axes.barh(list(shares), widths, left=left, color=color, label=f"{trit:+d}" if trit else "0")
        left += widths
    axes.set(title="trits per layer, %", xlim=(0, 100))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=max(4, min(8, 260 // max(len(shares), 1))))
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)


def plot_predictions(
    figure: Any, images: Sequence[npt.NDArray[np.uint8]], said: Sequence[str], correct: Sequence[bool], columns: int = 8
) -> None:
    """A grid of images, each under the caption it was given: green if right, red if wrong."""
    rows = max(-(-len(images) // columns), 1)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle("what the ternary student says of test images")
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption, right in zip(grid.flat, images, said, correct, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8, color="#2a7d3f" if right else "#c0392b", parse_math=False)
