"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.figure import Figure

from tclip_jax.numerics.report import Report, cells, headings
from tclip_jax.pages import heading, page, paragraph, plot, table


def to_html(report: Report) -> str:
    """One page: verdict, facts, the error of every row and the histogram of ULP distances as pictures, all tables."""
    verdict = [paragraph(line, f"verdict {'good' if report.passed else 'bad'}") for line in report.verdict]
    facts = table([[name, str(value)] for name, value in report.facts.items()], header=False)
    plots = [plot(plot_errors(report), "error of every row"), plot(plot_ulp(report), "histogram of ULP distances")]
    tables = []
    for name, rows in report.tables.items():
        lines = [headings(rows), *(cells(row, rows, report.budget) for row in rows)]
        tables += [heading(name), table(lines, marked=[line[-1] == "over" for line in lines])]
    return page(report.title, "\n".join([*verdict, facts, *plots, *tables]))


def plot_errors(report: Report) -> Figure:
    """The relative error of every row that has one on a logarithmic axis, one line per table, and the budget."""
    figure = Figure(figsize=(12, 4.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, rows in report.tables.items():
        values = np.array([getattr(row, "relative", row.max_abs) for row in rows])
        (drawn,) = np.nonzero(values)
        axes.plot(drawn, values[drawn], marker="o", markersize=3, linewidth=0.5, label=name)
        step = max(len(rows) // 40, 1)
        axes.set_xticks(range(0, len(rows), step), [row.name for row in rows[::step]], rotation=90, fontsize=7)
    if report.budget:
        axes.axhline(report.budget, color="#c0392b", linestyle="--", linewidth=1, label=f"budget {report.budget:g}")
    axes.set(yscale="log", ylabel="relative error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_ulp(report: Report) -> Figure:
    """How many float32 numbers lie between both sides: share of all elements by powers of two."""
    figure = Figure(figsize=(12, 3), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, rows in report.tables.items():
        counts = [row.ulp_counts for row in rows if hasattr(row, "ulp_counts")]
        if counts:
            total = np.sum(list(itertools.zip_longest(*counts, fillvalue=0)), axis=1)
            axes.step(range(len(total)), total / max(total.sum(), 1), where="mid", label=name)
            axes.legend(frameon=False)
    axes.set(title="ULP distance", xlabel="0, 1, 2–3, 4–7, …: below 2ⁿ", ylabel="share of elements")
    axes.grid(alpha=0.3)
    return figure
