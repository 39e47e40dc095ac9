"""A comparison of results as an aligned table, as JSON, and as one HTML page with a plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from matplotlib.figure import Figure

from tclip_jax.evaluation.comparison import Comparison, Delta, Flips, Row
from tclip_jax.evaluation.flipped import Pictures
from tclip_jax.evaluation.page import cards
from tclip_jax.pages import aligned, details, heading, page, paragraph, plot, table

_HEADINGS = ("dataset", "metric", "images", "A %", "B %", "B − A", "95 % interval", "", "lost", "gained", "p")
_SHORT = {
    "mean_average_precision": "mAP",
    "mean_per_class_recall": "per class",
    "image_retrieval_recall": "image R",
    "text_retrieval_recall": "text R",
}
_SHOWN_KEYS = 40


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as what `dump_json` takes, with every key of the images that changed."""
    whole = dataclasses.asdict(comparison)
    for row, found in zip(comparison.rows, whole["rows"], strict=True):
        for metric, delta in row.deltas.items():
            found["deltas"][metric] |= {"delta": delta.delta}
    whole["mean"] |= {"delta": comparison.mean.delta}
    return whole


def to_text(comparison: Comparison) -> str:
    """The table, in per cent and points, then what was refused and left out, and a verdict."""
    lines = [f"A: {comparison.a}: {comparison.models[0]}", f"B: {comparison.b}: {comparison.models[1]}", ""]
    lines += aligned(_table(comparison)) if comparison.rows else []
    return "\n".join([*lines, "", *_said_aloud(comparison), *verdict(comparison)])


def verdict(comparison: Comparison) -> list[str]:
    """What was found, in a line or two."""
    if not comparison.rows:
        return ["nothing was compared"]
    main = [row.deltas[row.metric] for row in comparison.rows]
    better, worse = (sum(each.clear and (each.delta > 0) is up for each in main) for up in (True, False))
    mean = comparison.mean
    spread = "" if math.isnan(mean.low) else f" ({100 * mean.low:+.2f} to {100 * mean.high:+.2f})"
    return [
        f"mean of {len(main)}: {100 * mean.a:.2f} % in A, {100 * mean.b:.2f} % in B, {100 * mean.delta:+.2f}{spread}",
        f"B is clearly better on {better}, clearly worse on {worse}; of 20 equal pairs one looks clear by chance",
    ]


def to_html(comparison: Comparison, pictures: Mapping[str, Pictures] = MappingProxyType({})) -> str:
    """One page: verdict, plot of the differences, the table, all metrics, and the images that changed.

    Args:
      pictures: by data set; the keys alone are shown of others.
    """
    color = ("good" if comparison.mean.delta > 0 else "bad") if comparison.mean.clear else ""
    said = [paragraph(line, f"verdict {color}") for line in verdict(comparison)]
    sides = [["A", comparison.a, comparison.models[0]], ["B", comparison.b, comparison.models[1]]]
    parts = [*said, table(sides, header=False), *(paragraph(line, "note") for line in _said_aloud(comparison))]
    if comparison.rows:
        parts += [plot(plot_deltas(comparison), "B − A with its 95 % interval, by data set")]
        marked = [False, *(_worse(row.deltas[row.metric]) for row in comparison.rows), False]
        parts += [heading("Data sets"), table(_table(comparison), marked=marked)]
        parts += [details("All metrics", table(_metrics(comparison)))]
    changed = [(row.dataset, row.flips) for row in comparison.rows if row.flips]
    parts += [heading("Images that changed"), *(_changed(*each, pictures) for each in changed)] if changed else []
    parts.append(
        paragraph(
            f"Intervals: paired bootstrap over images, {comparison.resamples:,} resamples, seed {comparison.seed}; "
            "lost and gained: images right in A and wrong in B, and the reverse (in retrieval an image is right if a "
            "caption of its own is among its five nearest); p: McNemar's exact test of the two.",
            "note",
        )
    )
    return page("Evaluation: B against A", "\n".join(parts))


def plot_deltas(comparison: Comparison) -> Figure:
    """One dot with its interval per data set, in points, in the order of the differences, and the mean below."""
    rows = sorted(comparison.rows, key=lambda row: row.deltas[row.metric].delta)
    names = [*(row.dataset for row in rows), "mean"]
    deltas = [*(row.deltas[row.metric] for row in rows), comparison.mean]
    figure = Figure(figsize=(11, 1.3 + 0.24 * len(names)), layout="constrained", dpi=110)
    axes = figure.subplots()
    for place, each in zip([*range(len(rows)), len(rows) + 0.5], deltas, strict=True):
        color = ("#2a7d3f" if each.delta > 0 else "#c0392b") if each.clear else "#777777"
        if not math.isnan(each.low):
            axes.plot([100 * each.low, 100 * each.high], [place, place], color=color, linewidth=2, alpha=0.5)
        axes.plot(100 * each.delta, place, marker="D" if place > len(rows) else "o", color=color, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([*range(len(rows)), len(rows) + 0.5], names)
    axes.invert_yaxis()
    axes.set(xlabel="B − A, points (95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _worse(delta: Delta) -> bool:
    return delta.clear and delta.delta < 0


def _table(comparison: Comparison) -> list[list[str]]:
    rows = [list(_HEADINGS), *(_line(row) for row in comparison.rows)]
    mean = _figures(comparison.mean)
    return [*rows, ["mean", "", "", *mean, "", "", ""]]


def _line(row: Row) -> list[str]:
    flips = ["", "", ""]
    if row.flips:
        flips = [f"{len(row.flips.lost):,}", f"{len(row.flips.gained):,}", f"{row.flips.p:.2g}"]
    images = f"{row.images:,}" if row.images else "–"
    return [row.dataset, _short(row.metric), images, *_figures(row.deltas[row.metric]), *flips]


def _figures(delta: Delta) -> list[str]:
    spread = "" if math.isnan(delta.low) else f"{100 * delta.low:+.2f} … {100 * delta.high:+.2f}"
    mark = ("better" if delta.delta > 0 else "worse") if delta.clear else ""
    return [f"{100 * delta.a:.2f}", f"{100 * delta.b:.2f}", f"{100 * delta.delta:+.2f}", spread, mark]


def _metrics(comparison: Comparison) -> list[list[str]]:
    lines = [["dataset", *_HEADINGS[1:2], *_HEADINGS[3:8]]]
    for row in comparison.rows:
        shown = {metric: delta for metric, delta in row.deltas.items() if not math.isnan(delta.delta)}
        lines += [[row.dataset, _short(metric), *_figures(delta)] for metric, delta in shown.items()]
    return lines


def _short(metric: str) -> str:
    name, at, k = metric.partition("@")
    return f"{_SHORT.get(name, name)}{at}{k}"


def _said_aloud(comparison: Comparison) -> list[str]:
    lines = [f"not compared: {name}: {reason}" for name, reason in comparison.refused.items()]
    lines += [
        f"{row.dataset}: compared on {row.images:,} images; left out {row.only_a:,} only in A, {row.only_b:,} only in B"
        for row in comparison.rows
        if row.only_a or row.only_b
    ]
    unknown = [row.dataset for row in comparison.rows if not row.checked]
    if unknown:
        lines.append(f"a result does not say what made it, so data and templates may differ: {', '.join(unknown)}")
    bare = [row.dataset for row in comparison.rows if not row.images]
    return [*lines, f"no predictions, so no intervals: {', '.join(bare)}"] if bare else lines


def _changed(name: str, flips: Flips, pictures: Mapping[str, Pictures]) -> str:
    found = pictures.get(name, Pictures((), (), ""))
    title = f"{name}: {len(flips.lost):,} lost, {len(flips.gained):,} gained"
    shown = [paragraph(f"no images: {found.why_not}", "note")] if found.why_not else []
    for what, images in (("lost", found.lost), ("gained", found.gained)):
        shown += [paragraph(what), cards(images)] if images else []
    return details(title, "".join([*shown, _keys(flips)]))


def _keys(flips: Flips) -> str:
    rows = [["right in A, wrong in B", "wrong in A, right in B"]]
    both = (flips.lost[:_SHOWN_KEYS], flips.gained[:_SHOWN_KEYS])
    for i in range(max(map(len, both))):
        rows.append([keys[i] if i < len(keys) else "" for keys in both])
    more = [
        f"and {len(keys) - _SHOWN_KEYS:,} more" if len(keys) > _SHOWN_KEYS else ""
        for keys in (flips.lost, flips.gained)
    ]
    rows += [more] if any(more) else []
    return table(rows)
