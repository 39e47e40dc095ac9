"""Everything read once: counts against what was planted, and duplicates against a dictionary."""

from __future__ import annotations

import collections
import json
import pathlib

import pytest

from tclip_jax import cli
from tclip_jax.data.sources import open_source
from tclip_jax.datasets import check as check_module
from tclip_jax.datasets.check import Findings, check, quantile

BROKEN = {"corrupt_image": 1, "no_caption": 1, "broken_shard": 1, "empty_shard": 1}


def test_what_was_planted_is_found(
    tars: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "check", "--data", f"wds:{tars}/*.tar", "--workers", "2", "--context-length", "20"]
    assert cli.main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["broken"] == BROKEN and (found["samples"], found["good"]) == (11, 7)
    assert found["formats"] == {"JPEG RGB": 7} and found["short_sides"]["0.5"] == 30 and found["long_sides"]["1"] == 40
    assert (found["captions"]["0"], found["captions"]["1"]) == (1, 1)
    # Start, "cat" and end are three tokens; of seven captions one has 40 · 3.
    assert found["tokens"]["0"] == 3 and found["tokens"]["1"] == 122 and found["cut_share"] == 1 / 7
    assert found["notes"] == [f"{tars}/00000.tar and 3 more: 1 file skipped: 1 .json; first 000012.json"]
    # The image of 000013 is that of 000000.
    assert found["duplicates"] == 1 and found["duplicate_examples"] == [[0, 6]]

    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "broken: corrupt_image" in said and "captions cut at 20 tokens" in said and "\n  0, 6" in said
    assert f"\nPassed over:\n  {tars}/00000.tar and 3 more: 1 file skipped" in said
    assert cli.main(["data", "check", "--data", f"wds:{tars}/00000.tar", "--workers", "1"]) == 0


def test_chunks_add_up(tars: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, spec = check(f"wds:{tars}/*.tar", "train", workers=1), f"wds:{tars}/*.tar"
    parts = Findings()
    for index in range(len(open_source(spec, "train"))):
        parts.add(check_module.check_part(spec, "train", index, index + 1)[0])
    parts.duplicates, parts.duplicate_examples = whole.duplicates, whole.duplicate_examples
    parts.notes = whole.notes
    assert parts == whole


def test_duplicates_are_those_of_a_dictionary(
    tmp_path: pathlib.Path, jpeg: collections.abc.Callable[[int], bytes]
) -> None:
    seeds = [0, 1, 2, 1, 3, 1, 0, 4]
    for i, seed in enumerate(seeds):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(seed))
        (tmp_path / f"{i}.txt").write_text("x")
    found = check(f"folder:{tmp_path}", "train", workers=1)
    assert found.duplicates == len(seeds) - len(set(seeds))
    assert found.duplicate_examples == [[1, 3, 5], [0, 6]]


def test_labelled_images_need_no_captions(tmp_path: pathlib.Path, jpeg: collections.abc.Callable[[int], bytes]) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpg").write_bytes(jpeg(len(name)))
    found = check(f"folder:{tmp_path}", "train", workers=1)
    assert found.samples == 2 and not found.broken


def test_quantiles() -> None:
    counts = collections.Counter({1: 5, 10: 4, 100: 1})
    assert [quantile(counts, share) for share in (0.0, 0.5, 0.51, 0.9, 1.0)] == [1, 1, 10, 10, 100]
    assert quantile(collections.Counter(), 0.5) == 0
