from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tclip_jax.numerics.report import Report, plot_errors, to_html, to_json, to_text
from tclip_jax.numerics.weights import measure
from tests.pages import Page

ONE = np.ones(1000, np.float32)


@pytest.fixture(scope="module")
def report() -> Report:
    broken = ONE.copy()
    broken[0] = np.nan
    rows = [
        measure("image/same", ONE, ONE),
        measure("image/near", ONE + np.float32(1e-6), ONE),
        measure("image/far", ONE * np.float32(1.5), ONE),
        measure("text/<broken>", broken, ONE),
        measure("text/zero", ONE, ONE * 0),
    ]
    tables = {"cumulative": rows, "isolated": rows[:1]}
    differing = {"quick_gelu": (True, False)}
    first = {"image": "image/far"}
    return Report("A & B", {"run by": "nobody"}, tables, 1e-5, ("found", "more"), False, differing, first, "a typo")


def test_text_is_short(report: Report) -> None:
    assert to_text(report).splitlines() == [
        "A & B",
        "  run by: nobody",
        "quick_gelu: ours true, reference false",
        "FAIL: found",
        "  more",
        "  guess: a typo",
    ]
    passed = dataclasses.replace(report, passed=True, configurations={}, guess="")
    assert to_text(passed).splitlines()[2:] == ["PASS: found", "  more"]


def test_the_tables_show_what_differs_in_aligned_columns(report: Report) -> None:
    lines = to_text(report, tables=True).splitlines()
    assert lines[:2] == ["A & B", "  run by: nobody"] and lines[-1] == "  guess: a typo"
    table = lines[lines.index("cumulative: 1 of 5 identical") + 1 : lines.index("isolated: 1 of 1 identical") - 1]
    assert [line.split()[0] for line in table[1:]] == ["image/near", "image/far", "text/<broken>", "text/zero"]
    assert [line.endswith("over") for line in table[1:]] == [False, True, True, True]
    ends = [line.removesuffix("over").rstrip() for line in table]
    assert len({len(line) for line in ends}) == 1


def test_json_is_strict_and_whole(report: Report) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(json.dumps(to_json(report)), parse_constant=refuse)
    assert [row["name"] for row in document["tables"]["cumulative"]] == [
        row.name for row in report.tables["cumulative"]
    ]
    far, zero = document["tables"]["cumulative"][2], document["tables"]["cumulative"][4]
    assert far["max_abs"] == 0.5 and sum(far["ulp_counts"]) == 1000 and zero["relative"] == "inf"
    assert document["passed"] is False and document["budget"] == 1e-5 and document["guess"] == "a typo"
    assert document["configurations"] == {"quick_gelu": {"ours": True, "reference": False}}
    assert document["first"] == {"image": "image/far"}


def test_the_page_loads_nothing(report: Report) -> None:
    page = to_html(report)
    parsed = Page(page)
    assert [picture.format for picture in parsed.pictures()] == 4 * ["PNG"]
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert {
        "A & B",
        "FAIL: found",
        "quick_gelu: ours true, reference false",
        "  guess: a typo",
    } <= set(parsed.words)
    assert "text/<broken>" in parsed.text and "image/far" in parsed.text
    assert page.count('class="over"') == 3


def test_a_page_of_identical_models_has_its_plots() -> None:
    same = Report("same", {}, {"isolated": [measure("a", ONE, ONE)]}, 1e-5, ("none",), True)
    assert to_html(same).count("data:image/png") == 4


@pytest.mark.parametrize("count", [1, 40, 41, 150])
def test_a_plot_names_at_most_forty_rows(count: int) -> None:
    rows = [measure(f"tensor {i}", ONE, 2 * ONE) for i in range(count)]
    (axes,) = plot_errors(Report("many", {}, {"weights": rows}, 0, (), False)).axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert 0 < len(names) <= 40 and names[0] == "tensor 0"
