"""Tars as a data set of TFDS: the same samples, parts made once, and what was dropped said by kind."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import tensorflow_datasets as tfds

from tclip_jax import cli
from tclip_jax.data.sources import open_source
from tclip_jax.datasets.prepare import Target, begin, finish, plan, prepare_part

GOOD = 7
DROPPED = {"corrupt_image": 1, "no_caption": 1, "broken_shard": 1, "empty_shard": 1}


def prepare_here(tars: pathlib.Path, out: pathlib.Path) -> Target:
    parts = plan(f"wds:{tars}/*.tar", "train", 10)
    target = begin(out, "toy", "train", parts)
    for number, part in enumerate(parts):
        prepare_part(target, number, part)
    return target


def test_the_good_samples_are_there_and_the_others_are_counted(
    tars: pathlib.Path, tmp_path: pathlib.Path, jpeg: Callable[[int], bytes]
) -> None:
    target = prepare_here(tars, tmp_path / "tfds")
    outcome = finish(target)

    assert outcome.dropped == DROPPED and outcome.samples - outcome.kept == 4 and outcome.kept == GOOD
    assert {kind for kind, _ in outcome.examples} == set(DROPPED)
    assert any("00001.tar/000011: not a usable image" in reason for _, reason in outcome.examples)
    assert outcome.notes == [f"{tars}/00001.tar: 1 file skipped: 1 .json; first 000012.json"]

    records = tfds.builder_from_directory(target.folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    found = [
        (record["key"].decode(), record["image"], [text.decode() for text in record["captions"]]) for record in records
    ]
    assert [key for key, _, _ in found] == ["000000", "000001", "000002", "000010", "000013", "000020", "000021"]
    assert found[1] == ("000001", jpeg(1), ["a dog"]) and found[3] == ("000010", jpeg(10), ["ein Café\nand a line"])
    assert "tensorflow" not in sys.modules

    as_tfds = open_source(f"tfds:toy@{tmp_path / 'tfds'}", "train")
    files = open_source(f"arrayrecord:{target.folder}/toy-train*-0000[012]-of-*", "train")
    assert (
        [as_tfds[i].image for i in range(GOOD)]
        == [files[i].image for i in range(GOOD)]
        == [image for _, image, _ in found]
    )
    assert files[3].captions == as_tfds[3].captions == ("ein Café\nand a line",)


def test_what_is_done_is_not_made_again_and_what_is_broken_is(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = prepare_here(tars, tmp_path / "tfds")
    files = [pathlib.Path(target.file(part)) for part in range(4)]
    was = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    files[1].write_bytes(was[1][1][:-1])
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00004: not made; the same command resumes with it"):
        finish(target)
    prepare_here(tars, tmp_path / "tfds")
    assert [file.stat().st_mtime_ns == time for file, (time, _) in zip(files, was, strict=True)] == [1, 0, 0, 1]
    assert [file.read_bytes() for file in files] == [data for _, data in was]
    assert finish(target).dropped == DROPPED


def test_splits_lie_side_by_side(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for split, tar in (("train", "00000"), ("val", "00001")):
        parts = plan(f"wds:{tars}/{tar}.tar", split, 10)
        target = begin(tmp_path / "tfds", "toy", split, parts)
        prepare_part(target, 0, parts[0])
        (target.notes.parent / "killed").mkdir(exist_ok=True)
        finish(target)
    splits = tfds.builder_from_directory(target.folder).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"train": 3, "val": 2}


def test_other_sources_are_cut_into_parts(tmp_path: pathlib.Path, jpeg: Callable[[int], bytes]) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    parts = plan(f"folder:{tmp_path}", "train", 2)
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 4), (4, 5)]
    target = begin(tmp_path / "tfds", "five", "train", parts)
    assert [prepare_part(target, number, part).kept for number, part in enumerate(parts)] == [2, 2, 1]
    assert finish(target).kept == 5


def test_what_is_refused(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parts = plan(f"wds:{tars}/*.tar", "train", 10)
    with pytest.raises(ValueError, match="the name 'CC-12M' is not of small letters"):
        begin(tmp_path, "CC-12M", "train", parts)
    with pytest.raises(ValueError, match="digits: its images have classes, not captions"):
        plan("digits", "train", 10)
    begin(tmp_path, "toy", "train", parts)
    with pytest.raises(
        ValueError, match=r"plan\.json: this data set is made from other samples \(it has 4 parts, not 2\)"
    ):
        begin(tmp_path, "toy", "train", parts[:2])
    shard = tars / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"and a line", b"and a lime"))
    with pytest.raises(ValueError, match=r"part 1 of wds:.*/00001\.tar: content: '\w+', not '\w+'\): choose another"):
        begin(tmp_path, "toy", "train", plan(f"wds:{tars}/*.tar", "train", 10))
    old = [[part.source, 0, None] for part in parts]
    (tmp_path / "toy" / "1.0.0" / "prepared" / "train" / "plan.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="part 0 was made by an older version, which kept no content"):
        begin(tmp_path, "toy", "train", parts)
    empty = plan(f"wds:{tars}/00003.tar", "train", 10)
    target = begin(tmp_path, "empty", "train", empty)
    prepare_part(target, 0, empty[0])
    with pytest.raises(ValueError, match=r"not one of 1 samples is good: \{'empty_shard': 1\}"):
        finish(target)


@pytest.mark.faults
def test_killed_and_started_again(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number in range(4, 200):
        os.link(tars / "00001.tar", tars / f"{number:05}.tar")
    command = [sys.executable, "-m", "tclip_jax", "data", "prepare", "--data", f"wds:{tars}/*.tar", "--name", "toy"]
    command += ["--workers", "2", "--json", "--out"]
    notes = tmp_path / "killed" / "toy" / "1.0.0" / "prepared" / "train"
    first = subprocess.Popen([*command, str(tmp_path / "killed")], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(notes.glob("0*.json"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    made = {path: path.stat().st_mtime_ns for path in notes.glob("0*.json")}
    assert 20 <= len(made) < 200 and not (notes.parents[1] / "dataset_info.json").exists()
    outcomes = []
    for out in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / out)], check=True, capture_output=True, text=True)
        outcomes.append(json.loads(done.stdout))
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert outcomes[0] | {"folder": ""} == outcomes[1] | {"folder": ""} and outcomes[0]["kept"] == GOOD + 196 * 2
    for path in (tmp_path / "whole").rglob("*.array_record*"):
        assert path.read_bytes() == (notes.parents[1] / path.name).read_bytes()


@pytest.mark.slow
def test_beam_writes_the_same_files(
    tars: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed (pip install 'tclip-jax[beam]')")
    command = ["data", "prepare", "--data", f"wds:{tars}/*.tar", "--name", "toy", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "here"), "--workers", "1"]) == 0
    here = json.loads(capsys.readouterr().out)
    options = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
    # In a process of its own: Beam's servers are not made for pytest's warnings.
    done = subprocess.run(
        [sys.executable, "-m", "tclip_jax", *command, "--out", str(tmp_path / "beam"), f"--beam={options}"],
        check=True,
        capture_output=True,
        text=True,
    )
    beam = json.loads(done.stdout)
    assert here | {"folder": ""} == beam | {"folder": ""} and beam["dropped"] == DROPPED
    for path in (tmp_path / "here").rglob("*.array_record*"):
        assert path.read_bytes() == (pathlib.Path(beam["folder"]) / path.name).read_bytes()


def test_without_beam_the_command_says_so(
    tars: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["data", "prepare", "--data", f"wds:{tars}/*.tar", "--name", "toy", "--out", str(tmp_path)]
    assert cli.main([*command, "--beam=--runner=DirectRunner"]) == 2
    assert "Apache Beam is not installed" in capsys.readouterr().err
