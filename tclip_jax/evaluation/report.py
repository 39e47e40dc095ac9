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

from tclip_jax.artifacts.pack import flatten
from tclip_jax.storage import write_atomic
from tclip_jax.ternary import TernaryTensor

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # run -> lines of its metrics.jsonl
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
    figure = Figure(figsize=(15, 9), layout="constrained", dpi=110)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.1)))
    loss, accuracy, trits = top.subplots(1, 3, width_ratios=(1, 1, 1.5))
    plot_curves(loss, curves, "loss/task", "contrastive loss")
    plot_curves(accuracy, curves, "zero_shot_accuracy", "zero-shot accuracy")
    plot_trits(trits, params)
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


def plot_trits(axes: Axes, params: Mapping[str, Any]) -> None:
    """Shares of −1, 0 and +1 in every ternary weight of every layer, as stacked bars."""
    shares = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, TernaryTensor):
            tower, *names = path.removesuffix("/kernel").removesuffix("/embedding").split("/")
            layers = np.asarray(leaf.trits)
            for layer, each in enumerate(layers if "blocks" in names else [layers]):
                label = f"{tower} {layer} {names[-1]}" if "blocks" in names else f"{tower} {names[-1]}"
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
