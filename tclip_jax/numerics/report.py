"""Report a comparison as text tables, JSON, or one HTML page."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure

from tclip_jax.numerics.configurations import in_words
from tclip_jax.pages import aligned, heading, page, paragraph, plot, plot_axes, properties, table


class Row(Protocol):
    """A line of a table: a dataclass; the table shows those of its fields that `_COLUMNS` lists."""

    @property
    def name(self) -> str: ...

    @property
    def max_abs(self) -> float: ...

    def over(self, budget: float) -> bool: ...


# Heading, attribute and format of every column. A table omits columns that none of its rows has.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("compared", "compared", ",d"),
    ("differ", "differ", ",d"),
    ("max |Δ|", "max_abs", ".1e"),
    ("relative", "relative", ".1e"),
    ("RMSE", "rmse", ".1e"),
    ("1 − cosine", "cosine", ".1e"),
    ("ULP 50 %", "ulp_50", ",.0f"),
    ("99 %", "ulp_99", ",.0f"),
    ("max", "ulp_max", ",.0f"),
    ("not finite", "nonfinite", ",d"),
    ("trit flips", "trit_flips", ",d"),
    ("scale error", "scale_error", ".1e"),
    ("first", "first", ""),
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of one comparison.

    Attributes:
      title: names of the two sides.
      facts: libraries, precision and figures of the whole comparison, as text.
      tables: rows by table name.
      budget: the largest relative error that passes; 0 requires equality.
      verdict: the result in one line, without PASS or FAIL, and further lines.
      passed: whether the comparison passed.
      configurations: options that the two sides state differently, as (ours, the reference's).
      first: the first row over budget, by tower.
      guess: what the rows over budget may mean; "" for no guess.
    """

    title: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]
    budget: float
    verdict: tuple[str, ...]
    passed: bool
    configurations: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    first: Mapping[str, str] = dataclasses.field(default_factory=dict)
    guess: str = ""


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as a JSON object; NaN and infinity become strings.

    `configurations` is {option: {"ours", "reference"}}.
    """
    configurations = {name: {"ours": a, "reference": b} for name, (a, b) in report.configurations.items()}
    return _finite(dataclasses.asdict(report) | {"configurations": configurations})


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_text(report: Report, *, tables: bool = False) -> str:
    """Return the facts, the options that differ, and the result.

    Args:
      report: the report.
      tables: whether to add aligned tables of the rows that differ.
    """
    lines = [report.title, *(f"  {name}: {value}" for name, value in report.facts.items())]
    for name, rows in report.tables.items() if tables else ():
        shown = [row for row in rows if row.max_abs or row.over(report.budget)]
        lines += ["", f"{name}: {len(rows) - len(shown)} of {len(rows)} identical"]
        lines += aligned([headings(shown), *(cells(row, shown, report.budget) for row in shown)]) if shown else []
        lines += [""] if name == [*report.tables][-1] else []
    return "\n".join([*lines, *verdict_lines(report)])


def verdict_lines(report: Report) -> list[str]:
    """Return the options that differ, the line of PASS or FAIL, further lines, and the guess."""
    result, *more = report.verdict
    guess = [f"  guess: {report.guess}"] if report.guess else []
    return [
        *in_words(report.configurations),
        f"{'PASS' if report.passed else 'FAIL'}: {result}",
        *(f"  {line}" for line in more),
        *guess,
    ]


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return [column for column in _COLUMNS if any(getattr(row, column[1], None) is not None for row in rows)]


def headings(rows: Sequence[Row]) -> list[str]:
    """Return the header row of a table; its first and last cell are empty."""
    return ["", *(heading for heading, _, _ in _columns(rows)), ""]


def cells(row: Row, rows: Sequence[Row], budget: float) -> list[str]:
    """Return the cells of `row` in the table of `rows`; the last cell is "over" or empty."""
    line = [row.name]
    for _, attribute, form in _columns(rows):
        value = getattr(row, attribute)
        line.append("" if value is None else format(1 - value if attribute == "cosine" else value, form))
    return [*line, "over" if row.over(budget) else ""]


def to_html(report: Report) -> str:
    """Return one HTML page: result, facts, plots of the errors and of the ULP histogram, and all tables."""
    verdict = [paragraph(line, f"verdict {'good' if report.passed else 'bad'}") for line in verdict_lines(report)]
    facts = properties([[name, str(value)] for name, value in report.facts.items()])
    plots, tables = [], []
    if report.tables:
        plots = [plot(plot_errors(report), "error of every row"), plot(plot_ulp(report), "histogram of ULP distances")]
    for name, rows in report.tables.items():
        lines = [headings(rows), *(cells(row, rows, report.budget) for row in rows)]
        tables += [heading(name), table(lines, marked=[line[-1] == "over" for line in lines])]
    return page(report.title, "\n".join([*verdict, facts, *plots, *tables]))


def plot_errors(report: Report) -> Figure:
    """Plot the error of every row on a logarithmic axis, a line for each table, and the budget."""
    axes = plot_axes(12, 4.5)
    for name, rows in report.tables.items():
        values = np.array([getattr(row, "relative", row.max_abs) for row in rows])
        (drawn,) = np.nonzero(values)
        axes.plot(drawn, values[drawn], marker="o", markersize=3, linewidth=0.5, label=name)
        step = max(math.ceil(len(rows) / 40), 1)
        axes.set_xticks(range(0, len(rows), step), [row.name for row in rows[::step]], rotation=90, fontsize=7)
    if report.budget:
        axes.axhline(report.budget, color="#c0392b", linestyle="--", linewidth=1, label=f"budget {report.budget:g}")
    axes.set(yscale="log", ylabel="relative error")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes.figure


def plot_ulp(report: Report) -> Figure:
    """Plot a histogram of ULP distances, in bins of powers of two, as shares of all elements."""
    axes = plot_axes(8, 3)
    for name, rows in report.tables.items():
        counts = [row.ulp_counts for row in rows if hasattr(row, "ulp_counts")]
        if counts:
            total = np.sum(list(itertools.zip_longest(*counts, fillvalue=0)), axis=1)
            axes.step(range(len(total)), total / max(total.sum(), 1), where="mid", label=name)
            axes.legend(frameon=False)
    axes.set(title="ULP distance", xlabel="0, 1, 2–3, 4–7, …: below 2ⁿ", ylabel="share of elements")
    axes.grid(alpha=0.3)
    return axes.figure
