"""Accuracy against bytes for each precision, from the kept results of the accuracy benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.accuracy_results import interval, shown

# Quantizer of a variant -> the name of its precision and its colour.
PRECISIONS = {
    "full": ("float16", "#9aa5b1"),
    "int8": ("int8", "#3b6fb6"),
    "int4": ("int4", "#5a9367"),
    "ternaryclip": ("ternary", "#d1603d"),
}
TERNARY = "ternary"
# What is measured -> its key in a result.
SIZES = {
    "towers, on disk": "bytes without embedding",
    "whole file": "bytes",
    "towers, in memory": "resident bytes without embedding",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """The results of one precision and width.

    Attributes:
      precision: a name of `PRECISIONS`.
      width: the width of the towers.
      results: by seed, of those that did not fail.
      failed: the number of those that did.
    """

    precision: str
    width: int
    results: Mapping[int, Mapping[str, Any]]
    failed: int = 0

    def accuracies(self, seeds: Iterable[int] | None = None) -> list[float]:
        """Return the accuracy of each seed, a fraction; of all seeds, or of some in their order."""
        return [self.results[seed]["accuracy"] for seed in (self.results if seeds is None else seeds)]

    def size(self, kind: str) -> float:
        """Return the mean bytes of a kind of `SIZES`."""
        return float(np.mean([result[SIZES[kind]] for result in self.results.values()]))


def points_of(entries: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the points of the entries by precision and width; other quantizers are left out.

    Raises:
      ValueError: two variants have the same precision and width, as with two learning rates.
    """
    groups: dict[tuple[str, int], dict[int, Any]] = {}
    variants: dict[tuple[str, int], str] = {}
    for entry in entries:
        quantizer = entry["variant"].partition("+")[0]
        if quantizer not in PRECISIONS:
            continue
        key = quantizer, entry["width"]
        if (other := variants.setdefault(key, entry["variant"])) != entry["variant"]:
            raise ValueError(f"{other} and {entry['variant']} are both {quantizer} of width {entry['width']}")
        groups.setdefault(key, {})[entry["seed"]] = entry["result"]
    order = list(PRECISIONS)
    points = []
    for quantizer, width in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        results = groups[quantizer, width]
        whole = {seed: result for seed, result in results.items() if "failed" not in result}
        points.append(Point(PRECISIONS[quantizer][0], width, whole, len(results) - len(whole)))
    return points


def at_equal_bytes(points: Iterable[Point], kind: str) -> list[tuple[Point, dict[str, list[float]]]]:
    """Compare ternary models with the other precisions at the same bytes.

    Between two widths of a precision, accuracy is interpolated linearly in the logarithm of the bytes, seed by seed.

    Args:
      points: of all precisions.
      kind: of bytes, a key of `SIZES`.

    Returns:
      For each ternary point, by precision, ternary minus interpolated accuracy of each seed that all points have, as
      fractions. A precision is left out where it has no smaller, or no larger model.
    """
    by_precision: dict[str, list[Point]] = {}
    for point in sorted((point for point in points if point.results), key=lambda point: point.size(kind)):
        by_precision.setdefault(point.precision, []).append(point)
    compared = []
    for ours in by_precision.pop(TERNARY, []):
        differences = {}
        for precision, others in by_precision.items():
            sizes = [other.size(kind) for other in others]
            if not sizes[0] <= ours.size(kind) <= sizes[-1]:
                continue
            seeds = sorted(set(ours.results).intersection(*(other.results for other in others)))
            theirs = np.array([other.accuracies(seeds) for other in others])
            between = [np.interp(np.log(ours.size(kind)), np.log(sizes), of_seed) for of_seed in theirs.T]
            differences[precision] = list(np.array(ours.accuracies(seeds)) - between)
        compared.append((ours, {name: each for name, each in differences.items() if each}))
    return compared


def points_table(points: Iterable[Point]) -> str:
    """Return a Markdown table of accuracies and sizes."""
    lines = [f"| precision | width | seeds | accuracy | {' | '.join(f'{kind}, kB' for kind in SIZES)} |"]
    lines.append("|---|---|---|---|" + "---|" * len(SIZES))
    for point in points:
        seeds = f"{len(point.results)} ({point.failed} failed)" if point.failed else str(len(point.results))
        sizes = [f"{point.size(kind) / 1e3:,.1f}" if point.results else "" for kind in SIZES]
        cells = [point.precision, str(point.width), seeds, shown(point.accuracies()), *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def equal_bytes_table(points: Iterable[Point]) -> str:
    """Return a Markdown table of ternary minus each other precision at equal bytes, the best of them in bold."""
    points = list(points)
    others = [name for name, _ in PRECISIONS.values() if name != TERNARY]
    lines = [f"| bytes | kB | ternary width | {' | '.join(f'to {name}' for name in others)} |"]
    lines.append("|---|---|---|" + "---|" * len(others))
    for kind in SIZES:
        for ours, differences in at_equal_bytes(points, kind):
            closest = min(differences, key=lambda name: float(np.mean(differences[name])), default="")
            cells = [kind, f"{ours.size(kind) / 1e3:,.1f}", str(ours.width)]
            for name in others:
                text = shown(differences.get(name, []), sign=True)
                cells.append(f"**{text}**" if name == closest else text)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def frontier_picture(
    points: Iterable[Point], kinds: Iterable[str] = ("towers, on disk", "towers, in memory")
) -> Figure:
    """Plot accuracy against bytes, a line for each precision, with 95 % intervals."""
    points, kinds = [point for point in points if point.results], list(kinds)
    figure = Figure(figsize=(4.6 * len(kinds), 3.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        for name, color in PRECISIONS.values():
            each = sorted((p for p in points if p.precision == name), key=lambda p: p.size(kind))
            means, halves = zip(*(interval(p.accuracies()) for p in each), strict=True) if each else ((), ())
            axes.errorbar(
                [p.size(kind) / 1e3 for p in each],
                [100 * mean for mean in means],
                yerr=[0 if np.isnan(half) else 100 * half for half in halves],
                label=name, color=color, marker="o", markersize=4, capsize=2, linewidth=2 if name == TERNARY else 1.2,
            )  # fmt: skip
        axes.set_xscale("log")
        ticks = [20, 50, 100, 200, 500]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(f"{kind}, kB")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e7eb", linewidth=0.6)
    figure.axes[0].set_ylabel("zero-shot accuracy, CIFAR-10, %")
    figure.axes[0].legend(frameon=False)
    return figure
