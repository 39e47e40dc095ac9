"""Whole or not at all: on a local disk, and on what stands for an object store."""

from __future__ import annotations

import pathlib

import pytest
from etils import epath

from tclip_jax import storage


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both; the stand-in is a local folder that is never renamed."""
    if request.param != "local":
        monkeypatch.setattr(storage, "is_local", lambda path: False)
    return request.param


def test_only_uris_are_object_stores(tmp_path: pathlib.Path) -> None:
    assert storage.is_local(epath.Path(tmp_path))
    assert storage.is_local(epath.Path("relative/path"))
    assert not storage.is_local(epath.Path("gs://bucket/path"))


def test_write_atomic_replaces_the_content(store: str, tmp_path: pathlib.Path) -> None:
    storage.write_atomic(tmp_path / "file", b"old")
    storage.write_atomic(tmp_path / "file", "néw")
    assert (tmp_path / "file").read_text("utf-8") == "néw"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_write_atomic_keeps_the_old_content_when_it_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(storage.os, "fsync", _raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_atomic_folder_appears_when_the_block_ends(store: str, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "deep" / "folder"
    with storage.atomic_folder(target) as building:
        (building / "inner").mkdir()
        (building / "inner" / "file").write_text("content")
        assert target.exists() == (store != "local")
    assert (target / "inner" / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_leaves_nothing_when_the_block_raises(
    store: str, tmp_path: pathlib.Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), storage.atomic_folder(tmp_path / "folder") as building:
        (building / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_refuses_what_exists_unless_told(store: str, tmp_path: pathlib.Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError, match="folder exists"), storage.atomic_folder(target):
        pass
    with storage.atomic_folder(target, overwrite=True) as building:
        (building / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_overwriting_keeps_the_old_folder_when_the_block_raises(tmp_path: pathlib.Path) -> None:
    with storage.atomic_folder(tmp_path / "folder") as building:
        (building / "file").write_text("old")
    with pytest.raises(ValueError), storage.atomic_folder(tmp_path / "folder", overwrite=True):
        raise ValueError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_overwriting_puts_the_old_folder_back_when_the_swap_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage.atomic_folder(tmp_path / "folder") as building:
        (building / "file").write_text("old")
    rename = type(building).rename

    def fail_on_the_new_one(path: epath.Path, target: epath.Path) -> epath.Path:
        if ".tmp-" in path.name:
            raise OSError("disk gone")
        return rename(path, target)

    monkeypatch.setattr(type(building), "rename", fail_on_the_new_one)
    with pytest.raises(OSError, match="disk gone"), storage.atomic_folder(tmp_path / "folder", overwrite=True):
        pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def _raise_interrupt(descriptor: int) -> None:
    raise KeyboardInterrupt
