"""A report as a table for people, in per cent."""

from __future__ import annotations

import math

from tclip_jax.evaluation.runner import AVERAGES, Report
from tclip_jax.pages import aligned

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
    "mean over {} sets, of caltech101, fgvc_aircraft, flowers and pets per class (OpenAI, DataComp)",
)


def report_table(report: Report) -> str:
    """A line per data set, with the metrics that occur, then both averages, what is partial, and what failed."""
    averages = average_lines(report)
    lines = [*(aligned(table_rows(report)) if report.results else []), *(["", *averages] if averages else [])]
    return "\n".join([*lines, *problem_lines(report)])


def table_rows(report: Report) -> list[list[str]]:
    """The headings, and the cells of each data set."""
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
    """Both averages in words; nothing with fewer than two classification sets."""
    sets = sum("acc1" in result.metrics for result in report.results.values())
    averages = report.averages
    return [f"{_AVERAGES[i].format(sets)}: {averages[name]:.2%}" for i, name in enumerate(AVERAGES) if sets > 1]


def problem_lines(report: Report) -> list[str]:
    """What is partial, and what failed."""
    lines = []
    for name, failed in report.partial.items():
        counts = ", ".join(f"{count:,} x {why}" for why, count in failed.items())
        lines.append(f"PARTIAL  {name}: {counts}")
    return [*lines, *(f"FAILED   {name}: {error}" for name, error in report.errors.items())]


def _per_cent(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if math.isnan(value) else f"{100 * value:.2f}"
