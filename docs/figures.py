"""Draw the figures of docs/concepts.md with the quantizers of the package: `python docs/figures.py`."""

from __future__ import annotations

import pathlib

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tclip_jax.ternary import Quantizer, ternarize

FOLDER = pathlib.Path(__file__).parent / "figures"
MINUS, ZERO, PLUS = "#3b6fb6", "#b9b9b9", "#d1603d"


def trit_figure() -> Figure:
    """Draw a histogram of the 256 weights of a group, coloured by trit, with the thresholds and the levels ±s."""
    w = np.random.default_rng(0).normal(0, 0.02, (256, 1)).astype(np.float32)
    ternary = ternarize(w, Quantizer())
    trits, scale = np.asarray(ternary.trits), float(ternary.scale[0, 0])
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.concatenate([np.linspace(side * scale / 2, side * 3.5 * scale / 2, 13) for side in (-1, 1)])
    edges = np.unique(np.concatenate([edges, np.linspace(-scale / 2, scale / 2, 9)]))
    for trit, color in ((-1, MINUS), (0, ZERO), (1, PLUS)):
        weights = w[trits == trit]
        axes.hist(weights, bins=edges, color=color, label=f"{trit:+d}: {len(weights)} weights"[trit == 0 :])
    for side in (-1, 1):
        axes.axvline(side * scale / 2, color="black", linestyle="--", linewidth=1)
        axes.annotate("", (side * scale, 0), (side * scale, -3), arrowprops={"arrowstyle": "->"}, annotation_clip=False)
    axes.annotate("Δ = s/2", (scale / 2, axes.get_ylim()[1]), (4, 0), textcoords="offset points", va="top")
    axes.set_xlabel(f"weight w of one group; arrows: ±s, s = 2 · mean |w| = {scale:.4f}", labelpad=10)
    axes.set_ylabel("number of weights")
    axes.legend(frameon=False, title="trit")
    _plain(axes)
    return figure


def group_figure() -> Figure:
    """Draw a kernel (8, 4) in groups of 4 inputs: latent weights, trits, scales and ternary weights."""
    rng = np.random.default_rng(1)
    w = (rng.normal(0, 1, (8, 4)) * rng.uniform(0.3, 1.6, (2, 4)).repeat(4, 0)).astype(np.float32)
    ternary = ternarize(w, Quantizer(group=4))
    figure = Figure(figsize=(9, 3), layout="constrained")
    parts = (
        ("latent w, float32", w, 2.5),
        ("trits, 1.58 bits", np.asarray(ternary.trits), 1),
        ("scales, one a group", np.asarray(ternary.scale), 2.5),
        ("ŵ = scale · trit", np.asarray(ternary.dequantize()), 2.5),
    )
    for axes, (title, values, limit) in zip(figure.subplots(1, 4), parts, strict=True):
        tall = values.repeat(8 // len(values), 0)
        axes.imshow(tall, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
        for (row, column), value in np.ndenumerate(values):
            place = (row + 0.5) * 8 / len(values) - 0.5
            text = f"{value:+d}"[int(value == 0) :] if values.dtype == np.int8 else f"{value:.2f}"
            light = abs(value) > 0.7 * limit
            axes.text(column, place, text, ha="center", va="center", fontsize=9, color="white" if light else "black")
        axes.axhline(3.5, color="black", linewidth=2)
        axes.set(title=title, xticks=[], yticks=[], xlabel="outputs N", frame_on=False)
    figure.axes[0].set_ylabel("inputs K, in groups of 4")
    return figure


def factor_figure() -> Figure:
    """Plot zeros and relative squared error against the factor k, for Gaussian and Laplacian weights."""
    factors, rng = np.linspace(0.2, 4, 20), np.random.default_rng(2)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    zeros, error = figure.subplots(1, 2)
    for name, w in (("Gaussian", rng.normal(size=(1024, 16))), ("Laplacian", rng.laplace(size=(1024, 16)))):
        w32 = w.astype(np.float32)
        tensors = [ternarize(w32, Quantizer(factor=float(k), group="channel")) for k in factors]
        zeros.plot(factors, [100 * float((each.trits == 0).mean()) for each in tensors], label=name)
        error.plot(
            factors, [float(np.square(w32 - each.dequantize()).sum() / np.square(w32).sum()) for each in tensors]
        )
    zeros.set(ylabel="zeros, % of trits", xlabel="factor k", ylim=(0, 100))
    error.set(ylabel="Σ(w − ŵ)² / Σw²", xlabel="factor k", ylim=(0, 1))
    for axes in (zeros, error):
        for factor, name in ((1, "BitNet b1.58"), (2, "TernaryCLIP")):
            axes.axvline(factor, color="black", linestyle=":", linewidth=1)
            axes.annotate(name, (factor, axes.get_ylim()[1]), (3, 0), textcoords="offset points", va="top", fontsize=8)
        _plain(axes)
    zeros.legend(frameon=False, loc="lower right")
    return figure


FIGURES = {"trit": trit_figure, "group": group_figure, "factor": factor_figure}


def main() -> None:
    """Write every figure as SVG. The bytes are reproducible."""
    # Keep text as text. Name one font: the default list of twelve fonts would be repeated at every text.
    matplotlib.rcParams.update({"svg.hashsalt": "tclip", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]})
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
