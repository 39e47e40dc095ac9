"""The outcome of a comparison, as an aligned table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tclip_jax.pages import aligned


class Row(Protocol):
    """What a table shows a line of: a dataclass whose fields are those of `_COLUMNS` that it has."""

    @property
    def name(self) -> str: ...

    @property
    def max_abs(self) -> float: ...

    def over(self, budget: float) -> bool: ...


# Heading, attribute and format of a column; those of another kind of row are left out of a table.
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
    """The outcome of one comparison.

    Attributes:
      title: what was compared with what.
      facts: precision, libraries and figures of the whole, in words.
      tables: rows by the name of their table.
      budget: of the relative error; 0 where equality is asked for.
      verdict: lines that say what was found.
      passed: whether nothing is over budget.
    """

    title: str
    facts: Mapping[str, Any]
    tables: Mapping[str, Sequence[Row]]
    budget: float
    verdict: tuple[str, ...]
    passed: bool


def to_json(report: Report) -> dict[str, Any]:
    """The whole report as what json.dumps takes; a figure that is not finite is a string."""
    return _finite(dataclasses.asdict(report))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_text(report: Report) -> str:
    """Facts, aligned tables of the rows that are not identical, and the verdict."""
    lines = [report.title, *(f"  {name}: {value}" for name, value in report.facts.items())]
    for name, rows in report.tables.items():
        shown = [row for row in rows if row.max_abs or row.over(report.budget)]
        lines += ["", f"{name}: {len(rows) - len(shown)} of {len(rows)} identical"]
        lines += aligned([headings(shown), *(cells(row, shown, report.budget) for row in shown)]) if shown else []
    return "\n".join([*lines, "", *report.verdict])


def _columns(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    return [column for column in _COLUMNS if any(getattr(row, column[1], None) is not None for row in rows)]


def headings(rows: Sequence[Row]) -> list[str]:
    """The first line of a table; its first and last cell are empty."""
    return ["", *(heading for heading, _, _ in _columns(rows)), ""]


def cells(row: Row, rows: Sequence[Row], budget: float) -> list[str]:
    """A line of the table of `rows`; its last cell is "over" or empty."""
    line = [row.name]
    for _, attribute, form in _columns(rows):
        value = getattr(row, attribute)
        line.append("" if value is None else format(1 - value if attribute == "cosine" else value, form))
    return [*line, "over" if row.over(budget) else ""]
