"""Whole steps, and the one that is read: incomplete copies never count."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import pytest
from etils import epath

from tclip_jax.runs import steps as module
from tclip_jax.runs.checkpoints import CheckpointConfig, Checkpoints
from tclip_jax.runs.checksums import CheckpointError
from tclip_jax.runs.steps import all_steps, first_whole, saved_steps, set_aside, whole_steps
from tests.runs.test_checksums import folder_of

Harm = Callable[[epath.Path], object]


def emptied(folder: epath.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


HARMS: dict[str, tuple[Harm, str]] = {
    "empty": (emptied, "9 has no commit_success.txt"),
    "no commit": (lambda folder: (folder / "commit_success.txt").unlink(), "9 has no commit_success.txt"),
    "no checksums": (lambda folder: (folder / "checksums.json").unlink(), "9 has no checksums.json"),
    "cut checksums": (lambda folder: (folder / "checksums.json").write_text('{"ver'), "checksums.json is damaged"),
    "missing": (lambda folder: (folder / "params" / "d" / "0").unlink(), "params/d/0 is missing"),
    "no part": (lambda folder: (folder / "params").rmtree(), "params/d/0 is missing"),
    "truncated": (lambda folder: (folder / "params" / "d" / "0").write_bytes(b"1"), "has 1 bytes instead of 256"),
    "emptied file": (lambda folder: (folder / "params" / "d" / "0").write_bytes(b""), "has 0 bytes instead of 256"),
}


@pytest.fixture(params=HARMS, ids=HARMS.keys())
def partial(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A folder with the whole steps 7 and 8 and the damaged step 9, and the message about step 9."""
    harm, message = HARMS[request.param]
    for step in (7, 8, 9):
        folder_of(tmp_path, step)
    harm(epath.Path(tmp_path) / "9")
    return tmp_path, message


def test_the_newest_whole_step_is_read_and_no_file_changes(
    partial: tuple[pathlib.Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, message = partial
    assert all_steps(folder) == [7, 8, 9] and saved_steps(folder) == [7, 8]
    assert first_whole(folder, [9, 8, 7], "params/") == 8
    (line,) = caplog.messages
    assert message in line and line.endswith(": reading step 8 instead")
    with pytest.raises(CheckpointError, match=message):
        first_whole(folder, [9], "params/")
    assert all_steps(folder) == [7, 8, 9]


def test_training_renames_the_damaged_step_and_resumes_from_the_whole_one(
    partial: tuple[pathlib.Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, message = partial
    assert whole_steps(folder) == [7, 8] == saved_steps(folder)
    assert not caplog.messages and all_steps(folder) == [7, 8, 9]  # the start may still be refused
    set_aside(folder, [7, 8])
    (line,) = caplog.messages
    assert message in line and line.endswith("renamed to 9.damaged; resuming from step 8")
    assert {path.name for path in folder.iterdir()} == {"7", "8", "9.damaged"}


def test_without_a_whole_step_a_run_is_not_started_again(partial: tuple[pathlib.Path, str]) -> None:
    folder, message = partial
    for step in (7, 8):
        (folder / str(step) / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"no step is whole: .*9.*; .*8 has no checksums.json.*; to start again"):
        whole_steps(folder)
    assert all_steps(folder) == [7, 8, 9]
    with pytest.raises(CheckpointError, match=f"{message}.*; .*8 has no checksums.json.*7 has no checksums.json"):
        first_whole(folder, [9, 8, 7])


def test_resuming_compares_contents(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of the right length with other bytes is detected by its checksum."""
    for step in (7, 8, 9):
        folder_of(tmp_path, step)
    for step in (8, 9):
        (tmp_path / str(step) / "params" / "d" / "0").write_bytes(bytes(256))
    (tmp_path / "9.damaged").mkdir()
    assert saved_steps(tmp_path) == [7, 8, 9] and whole_steps(tmp_path) == [7]
    set_aside(tmp_path, [7])
    assert saved_steps(tmp_path) == [7]
    assert "8.damaged; resuming from step 7" in caplog.text and "9.damaged; resuming from step 7" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"7", "8.damaged", "9.damaged"}
    assert whole_steps(tmp_path / "nowhere") == []


def test_an_older_damaged_step_is_renamed_too(tmp_path: pathlib.Path) -> None:
    """Otherwise it would count among the steps to keep, and could be the best."""
    for step in (7, 8, 9):
        folder_of(tmp_path, step)
    (tmp_path / "7" / "checksums.json").unlink()
    assert whole_steps(tmp_path) == [8, 9]
    with Checkpoints(tmp_path, CheckpointConfig(), [8, 9]):
        assert (tmp_path / "7.damaged").is_dir() and saved_steps(tmp_path) == [8, 9]


def test_a_newer_format_version_is_refused_and_not_renamed(tmp_path: pathlib.Path) -> None:
    for step in (7, 8):
        folder_of(tmp_path, step)
    stored = json.loads((tmp_path / "8" / "checksums.json").read_text())
    (tmp_path / "8" / "checksums.json").write_text(json.dumps(stored | {"version": 2}))
    for read in (whole_steps, saved_steps, lambda folder: first_whole(folder, [8, 7])):
        with pytest.raises(CheckpointError, match=r"8/checksums.json has version 2"):
            read(tmp_path)
    assert all_steps(tmp_path) == [7, 8]


def test_an_unfinished_step_on_an_object_store_is_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step has its final name there while it is written: a run killed at its first checkpoint starts again."""
    monkeypatch.setattr(module, "is_local", lambda path: False)
    folder_of(tmp_path, 7)
    (tmp_path / "7" / "commit_success.txt").unlink()
    assert saved_steps(tmp_path) == [] and whole_steps(tmp_path) == []
    set_aside(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_only_plain_numbers_are_steps(tmp_path: pathlib.Path) -> None:
    for name in ("7", "07", "8.damaged", "9.orbax-checkpoint-tmp", "²", "x"):
        (tmp_path / name).mkdir()
    assert all_steps(tmp_path) == [7] and all_steps(tmp_path / "nowhere") == []


def test_process_0_decides_and_all_raise_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Process 1 sees no file, and uses the step of process 0."""
    sent: list[object] = []
    monkeypatch.setattr(module, "allgather_json", lambda value: sent.append(value) or [{"value": 8}, value])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert first_whole(tmp_path / "unseen", [9, 8]) == 8 and whole_steps(tmp_path / "unseen") == 8
    assert sent == [{}, {}]
    monkeypatch.setattr(module, "allgather_json", lambda value: [{"error": "9 has no checksums.json"}, value])
    with pytest.raises(CheckpointError, match=r"^9 has no checksums.json$"):
        first_whole(tmp_path / "unseen", [9])
