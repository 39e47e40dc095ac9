"""A comparison as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from tclip_jax.numerics.report import Report, cells, headings

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }}
td, th {{ padding: .1rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child, th:first-child {{ text-align: left; }}
.over {{ background: #f6d5cc; }}
.verdict {{ font-weight: 600; color: {color}; }}
img {{ max-width: 100%; }}
</style>
<h1>{title}</h1>
{verdict}
{facts}
<img alt="error of every row" src="data:image/png;base64,{errors}">
<img alt="histogram of ULP distances" src="data:image/png;base64,{histogram}">
{tables}
"""


def to_html(report: Report) -> str:
    """One page: verdict, facts, the error of every row and the histogram of ULP distances as pictures, all tables."""
    facts = [[name, str(value)] for name, value in report.facts.items()]
    tables = [
        f"<h2>{html.escape(name)}</h2>"
        + _table([headings(rows), *(cells(row, rows, report.budget) for row in rows)], header=True)
        for name, rows in report.tables.items()
    ]
    return _PAGE.format(
        title=html.escape(report.title),
        color="#2a7d3f" if report.passed else "#c0392b",
        verdict="".join(f'<p class="verdict">{html.escape(line)}</p>' for line in report.verdict),
        facts=_table(facts),
        errors=_png(plot_errors(report)),
        histogram=_png(plot_ulp(report)),
        tables="".join(tables),
    )


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


def _table(rows: Sequence[Sequence[str]], header: bool = False) -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        mark = ' class="over"' if row[-1] == "over" else ""
        lines.append(f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()
