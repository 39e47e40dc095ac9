from __future__ import annotations

import json
import pathlib

import pytest

from tclip_jax.data import bad_samples
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.sources import FAULTS


def metrics(**counts: float) -> dict[str, float]:
    return {f"bad/{kind}": counts.get(kind, 0.0) for kind in FAULTS[1:]}


def test_each_sample_is_listed_once_and_an_existing_list_is_appended_to(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "bad.jsonl"
    for name in ("a", "b", "a"):
        BadSamples(path).add("no_image", name, "why")
    assert not caplog.messages  # a log line for each would hide the others
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"name": name, "kind": "no_image", "reason": "why"} for name in "ab"
    ]
    path.write_text(path.read_text() + '{"name": "c", "ki')  # a crash
    for name in ("d", "e"):
        BadSamples(path).add("no_image", name, "why")
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b", "d", "e"]


def test_the_length_of_the_list_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(bad_samples, "_MAX_LISTED", 3)
    bad = BadSamples(tmp_path / "bad.jsonl")
    for i in range(10):
        bad.add("no_image", str(i), "why")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 3


def test_too_many_bad_samples_stop_the_run_and_are_listed(tmp_path: pathlib.Path) -> None:
    bad = BadSamples(tmp_path / "bad.jsonl", max_share=0.1)
    bad.add("no_image", "the sample", "why")
    for _ in range(9):
        bad.check(metrics(no_image=50), 100)  # too few samples for a check
    with pytest.raises(ValueError, match=r"^500 of the last 1000 samples are bad \(no_image 500\), more than") as error:
        bad.check(metrics(no_image=50), 100)
    assert f'listed in {tmp_path}/bad.jsonl\n  {{"name": "the sample"' in str(error.value)


def test_the_share_is_that_of_recent_samples() -> None:
    bad = BadSamples(None, max_share=0.1)
    for _ in range(1000):
        bad.check(metrics(no_caption=10), 100)
    with pytest.raises(ValueError, match=r"\(corrupt_image \d+, no_caption \d+\)"):
        for step in range(1000):
            bad.check(metrics(corrupt_image=100), 100)
            assert step < 20


def test_news_are_counts_of_what_is_new(tmp_path: pathlib.Path) -> None:
    bad = BadSamples(tmp_path / "bad.jsonl")
    assert bad.news() == ""
    for i in range(2000):
        bad.add("no_image" if i % 4 else "no_caption", f"sample {i}", "why")
    line = "2,000 bad samples (no_caption 500, no_image 1,500), masked; the first: sample 0: why"
    assert bad.news() == line and bad.news() == ""
    bad.add("no_image", "sample 3", "why")  # known
    assert bad.news() == ""
    bad.add("no_image", "another", "gone")
    assert bad.news() == "1 bad sample (no_image 1), masked; the first: another: gone"
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2001
    assert BadSamples(tmp_path / "bad.jsonl").news() == ""


@pytest.mark.parametrize("max_share", [0.1, 1.0])
def test_a_run_without_a_usable_sample_stops_after_an_epoch_or_at_its_end(max_share: float) -> None:
    bad = BadSamples(None, max_share, epoch=30)
    for _ in range(3):
        bad.check(metrics(no_image=8), 8)
    with pytest.raises(ValueError, match=r"^none of the last 32 samples, a whole epoch, is usable \(no_image 32\)"):
        bad.check(metrics(no_image=8), 8)
    short = BadSamples(None, max_share, epoch=100)
    short.check(metrics(no_image=8), 8)
    with pytest.raises(ValueError, match=r"^none of all 8 samples is usable \(no_image 8\)"):
        short.finish()
    one = BadSamples(None, max_share, epoch=24)
    for count in (8, 8, 7, 8, 8):  # the third batch has a usable sample
        one.check(metrics(no_image=count), 8)
    with pytest.raises(ValueError, match="none of the last"):
        one.check(metrics(no_image=8), 8)


def test_a_share_over_the_limit_stops_a_short_run_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    for count, over in ((2, False), (3, True)):
        bad = BadSamples(None, max_share=0.1)
        bad.check(metrics(), 10)
        bad.check(metrics(no_image=count), 10)
        if over:
            with pytest.raises(ValueError, match=r"^3 of all 20 samples are bad \(no_image 3\), more than .*= 0.1"):
                bad.finish()
        else:
            bad.finish()
            assert "2 of 20 samples were bad (no_image 2)" in caplog.text
    caplog.clear()
    BadSamples(None).finish()
    assert not caplog.text


def test_a_resumed_run_counts_its_earlier_steps_at_the_end() -> None:
    resumed = BadSamples(None, max_share=0.1)
    resumed.resume({"no_image": 1.0}, 90)
    resumed.check(metrics(no_image=2), 10)
    resumed.finish()  # 3 of 100
    alone = BadSamples(None, max_share=0.1)
    alone.check(metrics(no_image=2), 10)
    with pytest.raises(ValueError, match="2 of all 10 samples"):
        alone.finish()
