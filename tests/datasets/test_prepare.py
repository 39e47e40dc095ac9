"""Tars as a data set of TFDS: equal samples, parts written once, and dropped samples counted by kind."""

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


def test_good_samples_are_written_and_bad_samples_are_counted(
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
    samples = [
        (record["key"].decode(), record["image"], [text.decode() for text in record["captions"]]) for record in records
    ]
    assert [key for key, _, _ in samples] == ["000000", "000001", "000002", "000010", "000013", "000020", "000021"]
    assert samples[1] == ("000001", jpeg(1), ["a dog"]) and samples[3] == ("000010", jpeg(10), ["ein Café\nand a line"])
    assert "tensorflow" not in sys.modules

    as_tfds = open_source(f"tfds:toy@{tmp_path / 'tfds'}", "train")
    files = open_source(f"arrayrecord:{target.folder}/toy-train*-0000[012]-of-*", "train")
    assert (
        [as_tfds[i].image for i in range(GOOD)]
        == [files[i].image for i in range(GOOD)]
        == [image for _, image, _ in samples]
    )
    assert files[3].captions == as_tfds[3].captions == ("ein Café\nand a line",)


def test_only_missing_and_broken_parts_are_written_again(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    target = prepare_here(tars, tmp_path / "tfds")
    files = [pathlib.Path(target.file(part)) for part in range(4)]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    files[1].write_bytes(before[1][1][:-1])
    files[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00004: missing; rerun the same command to resume"):
        finish(target)
    prepare_here(tars, tmp_path / "tfds")
    assert [file.stat().st_mtime_ns == time for file, (time, _) in zip(files, before, strict=True)] == [1, 0, 0, 1]
    assert [file.read_bytes() for file in files] == [data for _, data in before]
    assert finish(target).dropped == DROPPED


def test_a_data_set_with_two_splits(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for split, tar in (("train", "00000"), ("val", "00001")):
        parts = plan(f"wds:{tars}/{tar}.tar", split, 10)
        target = begin(tmp_path / "tfds", "toy", split, parts)
        prepare_part(target, 0, parts[0])
        (target.notes.parent / "killed").mkdir(exist_ok=True)
        finish(target)
    splits = tfds.builder_from_directory(target.folder).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"train": 3, "val": 2}


def test_other_sources_are_divided_into_parts(tmp_path: pathlib.Path, jpeg: Callable[[int], bytes]) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    parts = plan(f"folder:{tmp_path}", "train", 2)
    assert [(part.start, part.stop) for part in parts] == [(0, 2), (2, 4), (4, 5)]
    target = begin(tmp_path / "tfds", "five", "train", parts)
    assert [prepare_part(target, number, part).kept for number, part in enumerate(parts)] == [2, 2, 1]
    assert finish(target).kept == 5


def test_invalid_data_sets_are_refused(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parts = plan(f"wds:{tars}/*.tar", "train", 10)
    with pytest.raises(ValueError, match="the name 'CC-12M' must start with a lower-case letter"):
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
    with pytest.raises(ValueError, match="part 0 was written by an older version, which recorded no content"):
        begin(tmp_path, "toy", "train", parts)
    empty = plan(f"wds:{tars}/00003.tar", "train", 10)
    target = begin(tmp_path, "empty", "train", empty)
    prepare_part(target, 0, empty[0])
    with pytest.raises(ValueError, match=r"not one of 1 samples is good: \{'empty_shard': 1\}"):
        finish(target)


@pytest.mark.faults
def test_a_killed_command_resumes(tars: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for number in range(4, 200):
        os.link(tars / "00001.tar", tars / f"{number:05}.tar")
    command = [sys.executable, "-m", "tclip_jax", "data", "prepare", "--data", f"wds:{tars}/*.tar", "--name", "toy"]
    command += ["--workers", "2", "--json", "--out"]
    notes = tmp_path / "killed" / "toy" / "1.0.0" / "prepared" / "train"
    first = subprocess.Popen([*command, str(tmp_path / "killed")], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(list(notes.glob("0*.json"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    written = {path: path.stat().st_mtime_ns for path in notes.glob("0*.json")}
    assert 20 <= len(written) < 200 and not (notes.parents[1] / "dataset_info.json").exists()
    outcomes = []
    for out in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / out)], check=True, capture_output=True, text=True)
        outcomes.append(json.loads(done.stdout))
    assert {path: path.stat().st_mtime_ns for path in written} == written
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
    # In a separate process: Beam's servers fail under pytest's filter of warnings.
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


def test_missing_beam_is_an_error(
    tars: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["data", "prepare", "--data", f"wds:{tars}/*.tar", "--name", "toy", "--out", str(tmp_path)]
    assert cli.main([*command, "--beam=--runner=DirectRunner"]) == 2
    assert "Apache Beam is not installed" in capsys.readouterr().err
