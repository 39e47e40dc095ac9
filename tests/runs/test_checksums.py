"""Detection of damaged checkpoints: only a checkpoint that matches its checksums is whole."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from etils import epath

from tclip_jax.runs.checksums import CheckpointError, damage, write_checksums


def folder_of(tmp_path: pathlib.Path, step: int = 7) -> epath.Path:
    """Writes a checkpoint of two parts, with Orbax's files beside them."""
    folder = epath.Path(tmp_path) / str(step)
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(bytes(range(256)))
    (folder / "data").mkdir()
    (folder / "data" / "metadata").write_text("{}")
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    write_checksums(folder)
    (folder / "commit_success.txt").write_text("yes")
    return folder


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(range(255)), "params/d/0 has 255 bytes instead of 256"),
        (bytes(range(255)) + b"x", "params/d/0 is damaged"),
        (None, "params/d/0 is missing"),
    ],
)
def test_every_kind_of_damage_is_named(data: bytes | None, message: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "_CHECKPOINT_METADATA").write_text("rewritten by Orbax's commit")
    assert damage(folder) is None and damage(folder, contents=False) is None
    path = folder / "params" / "d" / "0"
    path.unlink() if data is None else path.write_bytes(data)
    assert message in str(damage(folder)) and message in str(damage(folder, "params/"))
    assert damage(folder, "data/") is None
    assert (damage(folder, contents=False) is None) == ("is damaged" in message)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"params/d/0": 3}', '{"params/d/0": {"bytes": 256}}', "3"])
def test_damaged_checksums_are_named(text: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "checksums.json").write_text(text)
    assert "checksums.json is damaged" in str(damage(folder))


@pytest.mark.parametrize("name", ["checksums.json", "commit_success.txt"])
def test_a_copy_without_its_last_files_is_not_whole(name: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).unlink()
    for contents in (True, False):
        assert f"7 has no {name}" in str(damage(folder, contents=contents))
        assert f"7 has no {name}" in str(damage(folder, "data/", contents=contents))


def edited(folder: epath.Path, edit: Any) -> None:
    stored = json.loads((folder / "checksums.json").read_text())
    edit(stored)
    (folder / "checksums.json").write_text(json.dumps(stored))


def test_missing_entries_are_named_and_foreign_files_ignored(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "notes.txt").write_text("beside the parts")
    (folder / "params" / ".nfs000").write_text("hidden")
    assert damage(folder) is None
    edited(folder, lambda stored: stored["files"].pop("params/d/0"))
    assert "checksums.json does not list params/d/0" in str(damage(folder))
    assert damage(folder, "data/") is None
    # A name that leads out of the folder is not one of its files.
    (tmp_path / "secret").write_text("x")
    edited(folder, lambda stored: stored.update(files={"../secret": {"bytes": 1, "sha256": "0"}}))
    assert "is missing" in str(damage(folder)) or "does not list" in str(damage(folder))


def test_format_versions_of_the_checksums(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    stored = json.loads((folder / "checksums.json").read_text())
    assert stored["version"] == 1 and set(stored["files"]) == {"params/d/0", "data/metadata"}
    (folder / "checksums.json").write_text(json.dumps(stored["files"]))  # as the first releases wrote them
    assert damage(folder) is None
    (folder / "checksums.json").write_text(json.dumps(stored | {"version": 2}))
    with pytest.raises(CheckpointError, match=r"checksums.json has version 2, this tclip_jax reads version 1"):
        damage(folder)


def test_the_command_in_the_message_works(tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    for name in ("checksums.json", "commit_success.txt"):
        (folder / name).unlink()
    (folder / "commit_success.txt").write_text("yes")
    command = str(damage(folder)).partition("`")[2].partition("`")[0].split()
    assert command[:3] == ["python", "-m", "tclip_jax.runs.checksums"]
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=900)
    assert damage(folder) is None
