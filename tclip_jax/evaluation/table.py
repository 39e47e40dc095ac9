"""A report as a table for people, in per cent."""

from __future__ import annotations

import math

from tclip_jax.evaluation.runner import AVERAGES, Report

_COLUMNS = {
    "acc1": "acc1",
    "acc5": "acc5",
    "mean_per_class_recall": "per class",
    "mean_average_precision": "mAP",
    "image_retrieval_recall@5": "image R@5",
    "text_retrieval_recall@5": "text R@5",
}
_AVERAGE_NAMES = dict(
    zip(AVERAGES, ("mean of acc1 (CLIP_benchmark)", "mean, four sets per class (OpenAI, DataComp)"), strict=True)
)


def report_table(report: Report) -> str:
    """A line per data set, with the metrics that occur, then what is partial, what failed, and both averages."""
    columns = {
        metric: title
        for metric, title in _COLUMNS.items()
        if any(metric in result.metrics for result in report.results.values())
    }
    rows = [["data set", "images", *columns.values()]]
    for name, result in report.results.items():
        rows.append([name, f"{result.samples:,}", *(_per_cent(result.metrics.get(metric)) for metric in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        name, *cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([name, *cells]).rstrip())
    lines = lines if report.results else []
    if average := report.averages:
        sets = sum("acc1" in result.metrics for result in report.results.values())
        lines += ["", *(f"{_AVERAGE_NAMES[name]}, {sets} sets: {value:.2%}" for name, value in average.items())]
    for name, failed in report.partial.items():
        counts = ", ".join(f"{count:,} x {why}" for why, count in failed.items())
        lines.append(f"PARTIAL  {name}: {counts}")
    lines += [f"FAILED   {name}: {error}" for name, error in report.errors.items()]
    return "\n".join(lines)


def _per_cent(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if math.isnan(value) else f"{100 * value:.2f}"
