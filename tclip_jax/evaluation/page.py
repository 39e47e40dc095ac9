"""The report of an evaluation: a table in per cent, or one self-contained HTML page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import jax
import tqdm
from etils import epath
from matplotlib.figure import Figure

from tclip_jax.evaluation.mistakes import Example, confusions, examples, weakest_classes
from tclip_jax.evaluation.results import Predictions, Result, read_predictions
from tclip_jax.evaluation.runner import AVERAGES, Report
from tclip_jax.evaluation.suite import main_metric
from tclip_jax.evaluation.tasks import Task, check_content
from tclip_jax.pages import (
    aligned,
    data_uri,
    details,
    heading,
    page,
    paragraph,
    plot,
    properties,
    row_axes,
    sample_name,
    table,
)
from tclip_jax.storage import write_atomic

_COLUMNS = {
    "acc1": "acc1",
    "acc5": "acc5",
    "mean_per_class_recall": "per class",
    "mean_average_precision": "mAP",
    "image_retrieval_recall@5": "image R@5",
    "text_retrieval_recall@5": "text R@5",
}
_AVERAGES = (
    "mean of acc1 over {} sets (CLIP_benchmark)",
    "mean over {} sets, per class for caltech101, fgvc_aircraft, flowers and pets (OpenAI, DataComp)",
)


def report_table(report: Report) -> str:
    """Return a line per data set with its metrics, then both averages, and partial and failed data sets."""
    averages = average_lines(report)
    lines = [*(aligned(table_rows(report)) if report.results else []), *(["", *averages] if averages else [])]
    return "\n".join([*lines, *problem_lines(report)])


def table_rows(report: Report) -> list[list[str]]:
    """Return the cells of the table: a row of headings, then a row per data set."""
    columns = {
        metric: title
        for metric, title in _COLUMNS.items()
        if any(metric in result.metrics for result in report.results.values())
    }
    rows = [["data set", "images", *columns.values()]]
    for name, result in report.results.items():
        rows.append([name, f"{result.samples:,}", *(_per_cent(result.metrics.get(metric)) for metric in columns)])
    return rows


def average_lines(report: Report) -> list[str]:
    """Return a line for each average; no line for fewer than two classification sets."""
    sets = sum("acc1" in result.metrics for result in report.results.values())
    averages = report.averages
    return [f"{_AVERAGES[i].format(sets)}: {averages[name]:.2%}" for i, name in enumerate(AVERAGES) if sets > 1]


def problem_lines(report: Report) -> list[str]:
    """Return a line per partial or failed data set."""
    lines = []
    for name, failed in report.partial.items():
        counts = ", ".join(f"{count:,} x {why}" for why, count in failed.items())
        lines.append(f"PARTIAL  {name}: {counts}")
    return [*lines, *(f"FAILED   {name}: {error}" for name, error in report.errors.items())]


def _per_cent(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


_LEGEND = (
    "Below each image are the truth, the prediction and the name. The mistakes are spread evenly over a data set. In "
    "retrieval, they are the images whose captions rank worst."
)


def write_page(path: epath.PathLike, report: Report, out: epath.PathLike, tasks: Sequence[Task]) -> None:
    """Write the page on process 0."""
    if jax.process_index() == 0:
        write_atomic(path, to_html(report, out, tasks))


def to_html(report: Report, out: epath.PathLike, tasks: Sequence[Task], *, limit: int = 12) -> str:
    """Return the page of an evaluation.

    Args:
      report: the results.
      out: folder of the results, which has the predictions.
      tasks: the evaluated tasks; their data is opened again for the images.
      limit: number of mistakes and of classes per data set.
    """
    results = list(report.results.values())
    parts = [paragraph(line, "verdict") for line in average_lines(report)]
    parts += [paragraph(line, "verdict bad") for line in problem_lines(report)]
    measured = {f"set-{i}": task for i, task in enumerate(tasks) if task.dataset.name in report.results}
    if results:
        partial = [False, *(name in report.partial for name in report.results)]
        links = {task.dataset.name: anchor for anchor, task in measured.items()}
        parts += [plot(plot_metrics(results), "the main metric of every data set")]
        parts += [heading("Data sets, in per cent"), table(table_rows(report), marked=partial, links=links)]
        parts += [heading("Mistakes"), paragraph(_LEGEND, "note")]
    for anchor, task in tqdm.tqdm(measured.items(), "report", unit="set", disable=None, leave=False):
        title, section = _section(report.results[task.dataset.name], out, task, limit)
        parts.append(details(title, section, anchor=anchor))
    if results:
        parts += [heading("Model and machine"), _facts(results)]
    models = dict.fromkeys(result.model for result in results)
    return page(f"Evaluation of {', '.join(models) or 'nothing'}", "\n".join(parts))


def cards(images: Sequence[Example]) -> str:
    """Return the HTML of images in rows, each with the truth and the prediction below."""
    return f'<div class="cards">{"".join(map(_card, images))}</div>'


def plot_metrics(results: Sequence[Result]) -> Figure:
    """Plot the main metric of each data set in per cent, the best one on top."""
    bars = {result.dataset: 100 * _main(result)[1] for result in results if not math.isnan(_main(result)[1])}
    names = sorted(bars, key=lambda name: bars[name])
    axes = row_axes(len(names))
    container = axes.barh(names, [bars[name] for name in names], color="#3b6fb6")
    axes.bar_label(container, fmt="%.1f", padding=3, fontsize=8)
    metrics = dict.fromkeys(_main(result)[0] for result in results)
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"{', '.join(_COLUMNS.get(metric, metric) for metric in metrics)} in %", loc="right")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return axes.figure


def _main(result: Result) -> tuple[str, float]:
    """Return the name and the value of the main metric."""
    name = main_metric(result.metrics)
    return name, result.metrics.get(name, math.nan)


def _facts(results: Sequence[Result]) -> str:
    first = results[0]
    seconds = sum(result.seconds for result in results)
    rows = [["weights", first.pretrained], ["dtype", first.dtype], ["images", f"{sum(r.samples for r in results):,}"]]
    rows += [["seconds", f"{seconds:,.1f}"], *([name, str(value)] for name, value in first.versions.items())]
    return properties(rows)


def _section(result: Result, out: epath.PathLike, task: Task, limit: int) -> tuple[str, str]:
    """Return the title of a data set, and the HTML of its mistakes."""
    metric, value = _main(result)
    title = f"{result.dataset}: {metric} {100 * value:.2f} %, {result.samples:,} images"
    try:
        predictions = read_predictions(out, result.dataset, result.made_by)
        _, source, _ = task.open()
        check_content(result.dataset, source, result.made_by.get("data", {}).get("content", ""))
        images = cards(examples(predictions, source, limit))
    except (OSError, ValueError) as error:
        return title, paragraph(f"no examples: {error}", "note")
    return title, images + _classes(predictions, source.classnames, limit)


def _classes(predictions: Predictions, classnames: Sequence[str], limit: int) -> str:
    if not classnames:
        return ""
    measure = "average precision %" if "scores" in predictions else "recall %"
    weakest = [
        [name, f"{100 * value:.1f}", f"{count:,}"]
        for name, value, count in weakest_classes(predictions, classnames, limit)
        if value < 1
    ]
    tables = [table([["weakest classes", measure, "images"], *weakest])] if weakest else []
    if "top" in predictions:
        pairs = [
            [truth, predicted, f"{count:,}"] for truth, predicted, count in confusions(predictions, classnames, limit)
        ]
        tables += [table([["confusions: true class", "predicted", "images"], *pairs], text=2)] if pairs else []
    return f'<div class="beside">{"".join(tables)}</div>'


def _card(example: Example) -> str:
    kind = ' class="small"' if example.small else ""
    lines = [] if example.truth in example.predicted else [("good", example.truth)]
    sides = ["A: ", "B: "] if len(example.predicted) > 1 else [""]
    for side, predicted in zip(sides, example.predicted, strict=True):
        lines.append(("good" if predicted == example.truth else "bad", f"{side}{predicted}"))
    caption = "".join(f'<span class="{color}">{html.escape(line)}</span><br>' for color, line in lines)
    picture = f'<img{kind} alt="" src="{data_uri(example.thumbnail, "jpeg")}">'
    return f"<figure>{picture}<figcaption>{caption}{sample_name(example.name)}</figcaption></figure>"
