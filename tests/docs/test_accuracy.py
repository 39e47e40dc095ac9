"""The tables of the accuracy page are those of the kept results."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_page", ROOT / "docs" / "accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(variant: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    result = {"accuracy": accuracy, "bytes without embedding": 40_000, "cpu_seconds": 200 if "soft" in variant else 100}
    which = {"data": "cifar10", "split": "choose", "width": 64, "steps": 1000, "distilled": True, "siglip": False}
    return which | {"variant": variant, "seed": seed, "result": result} | more


def test_the_page_is_made_from_the_kept_results(script: ModuleType) -> None:
    text, entries = script.PAGE.read_text("utf-8"), json.loads(script.RESULTS.read_text("utf-8"))["results"]
    assert "<!-- results: choose -->" in text
    assert text == script.page(text, entries), "run python docs/accuracy.py"
    picture = script.PICTURE.read_text("utf-8")
    assert script.made_by_results(script.chosen(entries, script.FRONTIER)) in picture, "run python docs/accuracy.py"
    assert len(picture) < 60_000


def test_rows_compare_by_seed_with_the_same_methods_and_show_failures(script: ModuleType) -> None:
    entries = [
        *(entry("full+x4", seed, value) for seed, value in ((0, 0.5), (1, 0.6))),
        *(entry("ternaryclip+x4", seed, value) for seed, value in ((0, 0.4), (1, 0.5))),
        *(entry("ternaryclip+soft+x4", seed, value) for seed, value in ((0, 0.45), (1, 0.57))),
        entry("ternaryclip+x9", 0, 0, result={"failed": "step 3: loss is nan"}),
    ]
    rows = script.table(entries).splitlines()[2:]
    assert rows[0].startswith("| full+x4 | 1,000 | 2 | 55.00 ± 63.53 |  |  | 40 |  |")
    assert rows[1].startswith(
        "| ternaryclip+soft+x4 | 1,000 | 2 | 51.00 ± 76.24 | +6.00 ± 12.71 | −4.00 ± 12.71 | 40 | 2.00x |"
    )
    assert rows[2].startswith("| ternaryclip+x4 | 1,000 | 2 | 45.00 ± 63.53 |  | −10.00 ± 0.00 | 40 |")
    assert rows[3] == "| ternaryclip+x9 | 1,000 | 1 | failed: step 3: loss is nan |  |  |  |  |"
    marked = "a\n<!-- results: choose -->\nold\n<!-- end -->\nb"
    assert script.page(marked, entries[:2]).splitlines()[3:5] == script.table(entries[:2]).splitlines()[:2]
    siglips = [entry("full+x4", 0, 0.5, siglip=True)]
    assert script.page(marked, siglips).splitlines()[4:7] == [*script.table([]).splitlines()[1:2], "", "<!-- end -->"]
    emoji = [entry("full+x4", 40, 0, data="emoji", split="test")]
    emoji[0]["result"] |= {"R@5": 0.4, "R@5 unseen names": 0.1}
    rows = script.page("<!-- results: emoji -->\n<!-- end -->\n<!-- results: emoji_unseen -->\n<!-- end -->", emoji)
    assert [line for line in rows.splitlines() if line.startswith("| full")] == [
        "| full+x4 | 1,000 | 1 | 40.00 |  |  | 40 |  |",
        "| full+x4 | 1,000 | 1 | 10.00 |  |  | 40 |  |",
    ]
    with pytest.raises(ValueError, match=r"accuracy.md: no table 'tables'"):
        script.page("<!-- results: tables -->\n<!-- end -->", [])


def test_the_frontier_leaves_out_the_first_runs_and_those_of_more_steps(script: ModuleType) -> None:
    sizes = dict.fromkeys(("bytes", "resident bytes", "resident bytes without embedding"), 40_000)
    entries = [
        entry(f"{quantizer}+x2+w{width}", seed, accuracy, width=width, data="cifar10_words", split="test")
        for quantizer, width, accuracy in (("full", 24, 0.5), ("ternaryclip", 64, 0.6))
        for seed in (20, 30, 31)
    ]
    # Of more steps: not in the frontier.
    entries.append(entry("full+longest+x2+w24", 32, 0.9, width=24, data="cifar10_words", split="test"))
    for each in entries:
        each["result"] |= sizes
    marked = "<!-- results: frontier -->\n<!-- end -->\n<!-- results: equal_bytes -->\n<!-- end -->"
    rows = [line for line in script.page(marked, entries).splitlines() if line.startswith("| ")]
    assert rows[1:3] == [
        "| float16 | 24 | 2 | 50.00 ± 0.00 | 40.0 | 40.0 | 40.0 |",
        "| ternary | 64 | 2 | 60.00 ± 0.00 | 40.0 | 40.0 | 40.0 |",
    ]
    # One width of float16 is no curve, but bytes equal to its own can be compared.
    assert rows[4].startswith("| towers, on disk | 40.0 | 64 |")


def test_full_precision_has_the_same_methods_and_steps_or_is_left_out(script: ModuleType) -> None:
    variants = {
        "full": 0.5,
        "full+added": 0.53,
        "ternaryclip": 0.4,
        "ternaryclip+added": 0.45,
        "ternaryclip+longer": 0.46,
    }
    rows = script.table(entry(variant, 0, value) for variant, value in variants.items()).splitlines()[2:]
    assert [row.split(" | ")[1:6] for row in rows] == [
        ["1,000", "1", "50.00", "", ""],
        ["1,100", "1", "53.00", "+3.00", ""],
        ["1,000", "1", "40.00", "", "−10.00"],
        ["1,100", "1", "45.00", "+5.00", "−8.00"],
        ["1,250", "1", "46.00", "+6.00", ""],
    ]
    (row,) = script.table([entry("ternaryclip+pretrained+added", 0, 0.5)]).splitlines()[2:]
    assert row.split(" | ")[1] == "2,200"


@pytest.mark.parametrize("seconds", [{}, {"cpu_seconds": None}, {"cpu_seconds": 0}])
def test_cpu_time_is_left_out_where_one_is_unknown(script: ModuleType, seconds: dict[str, Any]) -> None:
    unknown = {"accuracy": 0.5, "bytes without embedding": 40_000} | seconds
    one, other = entry("ternaryclip", 0, 0.5), entry("ternaryclip+soft", 0, 0.6)
    for entries in ([one, other | {"result": unknown}], [one | {"result": unknown}, other]):
        assert script.table(entries).splitlines()[3].endswith("| 40 |  |")
    assert script.table([one, other]).splitlines()[3].endswith("| 40 | 2.00x |")
    failed = one | {"result": {"failed": "step 3: loss is nan"}}
    assert script.table([failed, other]).splitlines()[3].endswith("| 60.00 |  |  | 40 |  |")
