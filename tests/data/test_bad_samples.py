from __future__ import annotations

import json
import logging
import pathlib

import pytest

from tclip_jax.data import bad_samples
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.sources import FAULTS


def metrics(**counts: float) -> dict[str, float]:
    return {f"bad/{kind}": counts.get(kind, 0.0) for kind in FAULTS[1:]}


def test_each_sample_is_listed_once_and_the_list_is_gone_on_with(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "bad.jsonl"
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b", "a"):
            BadSamples(path).add("no_image", name, "why")
    assert [record.getMessage() for record in caplog.records] == [
        "a: why; the sample counts with weight 0",
        "b: why; the sample counts with weight 0",
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"name": name, "kind": "no_image", "reason": "why"} for name in "ab"
    ]
    path.write_text(path.read_text() + '{"name": "c", "ki')  # a crash
    for name in ("d", "e"):
        BadSamples(path).add("no_image", name, "why")
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b", "d", "e"]


def test_the_list_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(bad_samples, "_LISTED", 3)
    bad = BadSamples(tmp_path / "bad.jsonl")
    for i in range(10):
        bad.add("no_image", str(i), "why")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 3


def test_too_many_stop_the_run_with_the_list(tmp_path: pathlib.Path) -> None:
    bad = BadSamples(tmp_path / "bad.jsonl", max_share=0.1)
    bad.add("no_image", "the sample", "why")
    for _ in range(9):
        bad.check(metrics(no_image=50), 100)  # too few to judge
    with pytest.raises(ValueError, match=r"^500 of the last 1000 samples are bad \(no_image 500\), more than") as error:
        bad.check(metrics(no_image=50), 100)
    assert f'listed in {tmp_path}/bad.jsonl\n  {{"name": "the sample"' in str(error.value)


def test_a_share_within_bounds_goes_on_and_the_past_is_forgotten() -> None:
    bad = BadSamples(None, max_share=0.1)
    for _ in range(1000):
        bad.check(metrics(no_caption=10), 100)
    with pytest.raises(ValueError, match=r"\(corrupt_image \d+, no_caption \d+\)"):
        for step in range(1000):
            bad.check(metrics(corrupt_image=100), 100)
            assert step < 20
