"""How damage to a checkpoint is noticed, and when one is due."""

from __future__ import annotations

import pathlib
import time

import jax.numpy as jnp
import pytest
from etils import epath

from tclip_jax.runs import checkpoints
from tclip_jax.runs.checkpoints import CheckpointError, Checkpoints, saved_steps, whole_steps
from tclip_jax.runs.checksums import damage, write_checksums
from tclip_jax.runs.policy import CheckpointConfig


def folder_of(tmp_path: pathlib.Path) -> epath.Path:
    folder = epath.Path(tmp_path) / "7"
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(bytes(range(256)))
    (folder / "data").mkdir()
    (folder / "data" / "metadata").write_text("{}")
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    write_checksums(folder)
    return folder


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(range(255)), "params/d/0 has 255 bytes instead of 256"),
        (bytes(range(255)) + b"x", "params/d/0 is damaged"),
        (None, "params/d/0 is missing"),
    ],
)
def test_every_kind_of_damage_is_named(data: bytes | None, said: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "_CHECKPOINT_METADATA").write_text("what Orbax adds on committing")
    assert damage(folder) is None
    path = folder / "params" / "d" / "0"
    path.unlink() if data is None else path.write_bytes(data)
    assert said in str(damage(folder)) and said in str(damage(folder, "params/"))
    assert damage(folder, "data/") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"params/d/0": 3}', '{"params/d/0": {"bytes": 256}}'])
def test_damaged_checksums(text: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "checksums.json").write_text(text)
    assert "checksums.json is damaged" in str(damage(folder))
    (folder / "checksums.json").unlink()  # as older versions left it
    assert damage(folder) is None


def test_damaged_steps_are_set_aside_until_one_is_whole(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    for step in (8, 9):
        (folder.parent / str(step)).mkdir()
        (folder.parent / str(step) / "checksums.json").write_text("{")
    (folder.parent / "9.damaged").mkdir()
    assert saved_steps(tmp_path) == [7, 8, 9] and whole_steps(tmp_path) == [7] == saved_steps(tmp_path)
    assert "9/checksums.json is damaged; renamed to 9.damaged; going on from step 8" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"7", "8.damaged", "9.damaged"}
    assert whole_steps(tmp_path / "nowhere") == []


def test_late_is_told_by_a_clock_that_cannot_be_set(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with Checkpoints(tmp_path / "c", CheckpointConfig(every=10, every_minutes=5)) as saver:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not saver.is_late() and saver.is_due(10) and not saver.is_due(11)
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + 301)
        assert saver.is_late() and saver.is_due(11, late=True)
        # "late" is the answer to the step before: what was saved meanwhile is not saved again at once.
        saver.save(11, {"params": {"w": jnp.ones(2)}}, {})
        assert not saver.is_late() and not saver.is_due(12, late=True)
        assert saver.is_due(13, late=True) and not saver.is_due(13) and saver.is_due(20)
    with Checkpoints(tmp_path / "d", CheckpointConfig()) as saver:
        assert not saver.is_late()


def test_a_folder_that_has_gone_while_it_was_written_fails_the_save_and_leaves_nobody_waiting(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in Orbax's thread, it would leave the other processes at its barrier for a day."""
    with Checkpoints(tmp_path / "c", CheckpointConfig()) as saver:
        iterdir = type(saver._folder).iterdir
        hidden = lambda self: (path for path in iterdir(self) if "3" not in path.name)  # noqa: E731
        monkeypatch.setattr(type(saver._folder), "iterdir", hidden)
        saver.save(3, {"params": {"w": jnp.ones(2)}}, {})
        with pytest.raises(CheckpointError, match=r"c/3: the checkpoint could not be written, .*no such folder"):
            saver.wait()
        monkeypatch.undo()
        saver._unfinished = None
