"""The report of a comparison: an aligned table, JSON, or an HTML page with a plot and the changed images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import tqdm
from etils import epath
from matplotlib.figure import Figure

from tclip_jax.data.sources import open_source
from tclip_jax.evaluation.comparison import Comparison, Delta, Flips, Row
from tclip_jax.evaluation.mistakes import Example, changed
from tclip_jax.evaluation.page import cards
from tclip_jax.evaluation.results import read_predictions
from tclip_jax.evaluation.suite import DATASETS
from tclip_jax.evaluation.tasks import SPLIT, check_content
from tclip_jax.pages import aligned, details, heading, page, paragraph, plot, properties, row_axes, table

_HEADINGS = ("dataset", "metric", "images", "A %", "B %", "B − A", "95 % interval", "", "lost", "gained", "p")
_SHORT = {
    "mean_average_precision": "mAP",
    "mean_per_class_recall": "per class",
    "image_retrieval_recall": "image R",
    "text_retrieval_recall": "text R",
}
_MAX_KEYS = 40


class Pictures(NamedTuple):
    """Some changed images of a data set, or the error that prevented reading them.

    Attributes:
      lost, gained: images that are correct only in A, or only in B.
      error: the reason why there are no images; "" without an error.
    """

    lost: tuple[Example, ...]
    gained: tuple[Example, ...]
    error: str


def flipped(comparison: Comparison, root: epath.PathLike | None, limit: int = 7) -> dict[str, Pictures]:
    """Read up to `limit` lost and `limit` gained images of every data set with changed predictions.

    The mapping is by the name of the row.

    Args:
      comparison: the comparison.
      root: folder of the webdataset exports of suites; None to skip these. Results of other data state its source.
      limit: number of images of either kind.
    """
    pictures = {}
    rows = [(row, row.flips) for row in comparison.rows if row.flips and (row.flips.lost or row.flips.gained)]
    for row, flips in tqdm.tqdm(rows, "images", unit="set", disable=None, leave=False):
        spec = row.source or row.dataset  # an older result is named after its source
        if not row.source and row.dataset in DATASETS:
            if root is None:
                continue
            spec = f"wds:{epath.Path(root).expanduser() / DATASETS[row.dataset].folder}"
        try:
            source = open_source(spec, row.split or SPLIT)
            check_content(spec, source, row.content)
            folders = (epath.Path(folder) / row.probe for folder in (comparison.a, comparison.b))
            a, b = (read_predictions(folder, row.dataset) for folder in folders)
            lost, gained = (tuple(changed(a, b, keys, source, limit)) for keys in (flips.lost, flips.gained))
            pictures[row.name] = Pictures(lost, gained, "")
        except (ValueError, OSError) as error:
            pictures[row.name] = Pictures((), (), str(error))
    return pictures


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison for `dump_json`, with the keys of all changed images."""
    fields = dataclasses.asdict(comparison)
    for row, row_fields in zip(comparison.rows, fields["rows"], strict=True):
        for metric, delta in row.deltas.items():
            row_fields["deltas"][metric] |= {"delta": delta.delta}
    fields["mean"] |= {"delta": comparison.mean.delta}
    return fields


def to_text(comparison: Comparison) -> str:
    """Return the table in per cent and points, then refused data sets, left out images, and the verdict."""
    lines = [f"A: {comparison.a}: {comparison.models[0]}", f"B: {comparison.b}: {comparison.models[1]}", ""]
    lines += aligned(_table(comparison)) if comparison.rows else []
    return "\n".join([*lines, "", *_notes(comparison), *verdict(comparison)])


def verdict(comparison: Comparison) -> list[str]:
    """Return the conclusion in one or two lines."""
    if not comparison.rows:
        return ["nothing was compared"]
    main = [row.deltas[row.metric] for row in comparison.rows]
    better, worse = (sum(each.clear and (each.delta > 0) is positive for each in main) for positive in (True, False))
    mean = comparison.mean
    spread = "" if math.isnan(mean.low) else f" ({100 * mean.low:+.2f} to {100 * mean.high:+.2f})"
    figures = f"{100 * mean.a:.2f} % in A, {100 * mean.b:.2f} % in B, {100 * mean.delta:+.2f}{spread}"
    if len(main) == 1:
        word = "better" if better else "worse" if worse else "better or worse"
        clear = f"B is {'' if better or worse else 'not '}clearly {word}"
        return [f"{comparison.rows[0].name}: {figures}", f"{clear}; about 1 of 20 equal pairs looks clear by chance"]
    return [
        f"mean of {len(main)}: {figures}",
        f"B is clearly better on {better}, clearly worse on {worse}; about 1 of 20 equal pairs looks clear by chance",
    ]


def to_html(comparison: Comparison, pictures: Mapping[str, Pictures] = MappingProxyType({})) -> str:
    """Return one self-contained page: verdict, plot of the differences, table, all metrics, and changed images.

    Args:
      comparison: the comparison.
      pictures: output of `flipped`. The page shows only the names of the changed images of other data sets.
    """
    color = ("good" if comparison.mean.delta > 0 else "bad") if comparison.mean.clear else ""
    parts = [paragraph(line, f"verdict {color}") for line in verdict(comparison)]
    sides = [["A", comparison.a, comparison.models[0]], ["B", comparison.b, comparison.models[1]]]
    parts += [properties(sides), *(paragraph(line, "note") for line in _notes(comparison))]
    flips = {f"set-{i}": (row, row.flips) for i, row in enumerate(comparison.rows) if row.flips}
    if comparison.rows:
        parts += [plot(plot_deltas(comparison), "B − A with its 95 % interval, by data set")]
        marked = [False, *(_worse(row.deltas[row.metric]) for row in comparison.rows)]
        links = {row.name: anchor for anchor, (row, _) in flips.items()}
        parts += [heading("Data sets"), table(_table(comparison), text=2, marked=marked, links=links)]
    if flips:
        parts.append(heading("Changed images"))
        if any(row.name not in pictures and (each.lost or each.gained) for row, each in flips.values()):
            parts.append(paragraph("--data DIR, the folder of the exports, adds the images of a suite.", "note"))
        parts += [_changed(row.name, each, pictures, anchor) for anchor, (row, each) in flips.items()]
    if comparison.rows:
        parts += [heading("All metrics"), table(_metrics(comparison), text=2)]
    parts.append(
        paragraph(
            f"Intervals: paired bootstrap over images, {comparison.resamples:,} resamples, seed {comparison.seed}. "
            "Lost images are correct in A and wrong in B, gained images the reverse. In retrieval, an image is correct "
            "if one of its captions is among its five nearest captions. p: McNemar's exact test of the two counts.",
            "note",
        )
    )
    return page("Evaluation: B against A", "\n".join(parts))


def plot_deltas(comparison: Comparison) -> Figure:
    """Plot the difference of each data set with its interval, in points, the worst on top, and the mean below."""
    rows = sorted(comparison.rows, key=lambda row: row.deltas[row.metric].delta)
    # The mean is half a row below the others; of a single row it would repeat the row.
    above = 1.5 if len(rows) > 1 else 0.0
    lines = [(above + len(rows) - 1 - i, row.name, row.deltas[row.metric], "o") for i, row in enumerate(rows)]
    lines += [(0.0, "mean", comparison.mean, "D")] if above else []
    axes = row_axes(above + len(rows))
    for y, _, each, marker in lines:
        color = ("#2a7d3f" if each.delta > 0 else "#c0392b") if each.clear else "#777777"
        if not math.isnan(each.low):
            axes.plot([100 * each.low, 100 * each.high], [y, y], color=color, linewidth=2, alpha=0.5)
        axes.plot(100 * each.delta, y, marker=marker, color=color, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks([y for y, *_ in lines], [name for _, name, *_ in lines])
    axes.margins(x=0.1)
    axes.set_xlabel("B − A, points (95 % interval)", loc="right")
    axes.grid(axis="x", alpha=0.3)
    return axes.figure


def _worse(delta: Delta) -> bool:
    return delta.clear and delta.delta < 0


def _table(comparison: Comparison) -> list[list[str]]:
    rows = [list(_HEADINGS), *(_line(row) for row in comparison.rows)]
    mean = ["mean", "", "", *_figures(comparison.mean), "", "", ""]
    return [*rows, *([mean] if len(comparison.rows) > 1 else [])]


def _line(row: Row) -> list[str]:
    flips = ["", "", ""]
    if row.flips:
        flips = [f"{len(row.flips.lost):,}", f"{len(row.flips.gained):,}", f"{row.flips.p:.2g}"]
    images = f"{row.images:,}" if row.images else "–"
    return [row.name, _short(row.metric), images, *_figures(row.deltas[row.metric]), *flips]


def _figures(delta: Delta) -> list[str]:
    spread = "" if math.isnan(delta.low) else f"{100 * delta.low:+.2f} … {100 * delta.high:+.2f}"
    mark = ("better" if delta.delta > 0 else "worse") if delta.clear else ""
    return [f"{100 * delta.a:.2f}", f"{100 * delta.b:.2f}", f"{100 * delta.delta:+.2f}", spread, mark]


def _metrics(comparison: Comparison) -> list[list[str]]:
    lines = [["dataset", *_HEADINGS[1:2], *_HEADINGS[3:8]]]
    for row in comparison.rows:
        shown = {metric: delta for metric, delta in row.deltas.items() if not math.isnan(delta.delta)}
        lines += [[row.name, _short(metric), *_figures(delta)] for metric, delta in shown.items()]
    return lines


def _short(metric: str) -> str:
    name, at, k = metric.partition("@")
    return f"{_SHORT.get(name, name)}{at}{k}"


def _notes(comparison: Comparison) -> list[str]:
    def named(names: Sequence[str]) -> str:
        return f"all {len(names)} data sets" if 1 < len(names) == len(comparison.rows) else ", ".join(names)

    lines = [f"not compared: {name}: {reason}" for name, reason in comparison.refused.items()]
    lines += [
        f"{row.name}: compared on {row.images:,} images; left out {row.only_a:,} only in A, {row.only_b:,} only in B"
        for row in comparison.rows
        if row.only_a or row.only_b
    ]
    unchecked = [row.name for row in comparison.rows if not row.checked]
    if unchecked:
        lines.append(f"a result does not record what made it, so data and templates may differ: {named(unchecked)}")
    without = [row.name for row in comparison.rows if not row.images]
    return [*lines, f"no predictions, so no intervals: {named(without)}"] if without else lines


def _changed(name: str, flips: Flips, pictures: Mapping[str, Pictures], anchor: str) -> str:
    shown = pictures.get(name, Pictures((), (), ""))
    title = f"{name}: {len(flips.lost):,} lost, {len(flips.gained):,} gained"
    parts = [paragraph(f"no images: {shown.error}", "note")] if shown.error else []
    for keys, images, kind in (
        (flips.lost, shown.lost, "lost: correct in A, wrong in B"),
        (flips.gained, shown.gained, "gained: wrong in A, correct in B"),
    ):
        parts += [paragraph(f"{len(images)} of {len(keys):,} {kind}"), cards(images)] if images else []
    if shown.lost or shown.gained:
        parts.append(details("names of the changed images", _keys(flips), is_open=False))
    elif flips.lost or flips.gained:
        parts.append(_keys(flips))
    return details(title, "".join(parts), anchor=anchor)


def _keys(flips: Flips) -> str:
    rows = [["correct in A, wrong in B", "wrong in A, correct in B"]]
    both = (flips.lost[:_MAX_KEYS], flips.gained[:_MAX_KEYS])
    for i in range(max(map(len, both))):
        rows.append([keys[i] if i < len(keys) else "" for keys in both])
    more = [
        f"and {len(keys) - _MAX_KEYS:,} more" if len(keys) > _MAX_KEYS else "" for keys in (flips.lost, flips.gained)
    ]
    rows += [more] if any(more) else []
    return table(rows, text=2)
