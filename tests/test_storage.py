"""Atomic writes on a local disk and on a simulated object store."""

from __future__ import annotations

import json
import math
import pathlib
import resource
import signal

import pytest
from etils import epath

from tclip_jax import storage
from tests.object_store import Bucket, Failure


@pytest.fixture(params=["local", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> epath.Path:
    """An empty folder, once on a local disk and once in a bucket."""
    if request.param == "local":
        return epath.Path(tmp_path)
    request.getfixturevalue("bucket")
    return epath.Path("gs://bucket")


def names(place: epath.Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_the_environment_sets_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TCLIP_CACHE_DIR", "~/there")
    assert storage.cache_folder() == tmp_path / "there"
    for unset in (lambda: monkeypatch.setenv("TCLIP_CACHE_DIR", ""), lambda: monkeypatch.delenv("TCLIP_CACHE_DIR")):
        unset()
        assert storage.cache_folder() == tmp_path / ".cache" / "tclip_jax"


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    text = storage.dump_json({"a": math.nan, "b": [math.inf, {"c": (-math.inf, 1.5)}], "d": "NaN"}, indent=None)
    assert text.endswith("}\n") and text.count("\n") == 1
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, {"c": [None, 1.5]}], "d": "NaN"}


def test_only_uris_are_object_stores(tmp_path: pathlib.Path) -> None:
    assert storage.is_local(epath.Path(tmp_path))
    assert storage.is_local(epath.Path("relative/path"))
    assert not storage.is_local(epath.Path("gs://bucket/path"))


def test_write_atomic_replaces_the_content(place: epath.Path) -> None:
    storage.write_atomic(place / "file", b"old")
    storage.write_atomic(place / "file", "néw")
    assert (place / "file").read_bytes().decode() == "néw" and names(place) == ["file"]


def test_write_atomic_keeps_the_old_content_when_it_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(storage.os, "fsync", _raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_error_of_a_missing_folder_names_it(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "none" / "file"
    for atomic in (storage.atomic_file, storage.atomic_local_file):
        with pytest.raises(FileNotFoundError, match="none: no such folder, so file"), atomic(path):
            pass


def test_atomic_folder_appears_when_the_block_ends(place: epath.Path) -> None:
    target = place / "deep" / "folder"
    with storage.atomic_folder(target) as building:
        (building / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content" and names(target.parent) == ["folder"]


def test_atomic_folder_moves_nested_folders(tmp_path: pathlib.Path) -> None:
    for text in ("old", "new"):
        with storage.atomic_folder(tmp_path / "folder", overwrite=True) as building:
            (building / "inner").mkdir()
            (building / "inner" / "file").write_text(text)
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_folder_leaves_nothing_when_the_block_raises(place: epath.Path, error: type[BaseException]) -> None:
    with pytest.raises(error), storage.atomic_folder(place / "folder") as building:
        (building / "file").write_text("half")
        raise error
    assert names(place) == []


def test_atomic_folder_refuses_an_existing_folder_without_overwrite(place: epath.Path) -> None:
    target = place / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError, match="folder exists"), storage.atomic_folder(target):
        pass
    with storage.atomic_folder(target, overwrite=True) as building:
        (building / "new").write_text("new")
    assert names(target) == ["new"] and names(place) == ["folder"]


def test_a_failed_upload_leaves_the_old_file(bucket: type[Bucket]) -> None:
    """The upload fails when it is opened, at each of its writes, when it is closed, and when it is renamed."""
    path = epath.Path("gs://bucket/file")
    storage.write_atomic(path, "old")
    for operation, number in (("open", 1), ("write", 1), ("write", 2), ("write", 3), ("close", 1), ("copy", 1)):
        bucket.failing = Failure(operation, number)
        with pytest.raises(OSError, match="the network is gone"), storage.atomic_file(path) as file:
            for part in (b"n", b"e", b"w"):
                file.write(part)
        bucket.failing = lambda operation, path: None
        assert path.read_text() == "old" and names(epath.Path("gs://bucket")) == ["file"], operation


def test_a_failed_upload_leaves_the_old_folder(bucket: type[Bucket]) -> None:
    """Each operation on two files fails once; if all later ones fail too, the message says where the old folder is."""
    place, folder = epath.Path("gs://bucket"), epath.Path("gs://bucket/folder")
    outcomes: list[str] = []
    for always_after in (False, True):
        for operation, count in (("open", 2), ("write", 2), ("close", 2), ("copy", 4), ("remove", 5)):
            for number in range(1, count + 1):
                bucket.store.clear()
                for name in ("a", "b"):
                    storage.write_atomic(folder / name, f"old {name}")
                bucket.failing, message = Failure(operation, number, always_after=always_after), ""
                try:
                    with storage.atomic_folder(folder, overwrite=True) as building:
                        for name in ("a", "b"):
                            (building / name).write_text(f"newer {name}")
                except OSError as error:
                    message = str(error)
                bucket.failing = lambda operation, path: None
                _, _, elsewhere = message.partition("is whole in ")
                texts = {name: (epath.Path(elsewhere or folder) / name).read_text() for name in ("a", "b")}
                assert texts in ({"a": "old a", "b": "old b"}, {"a": "newer a", "b": "newer b"}), (operation, number)
                outcomes.append(elsewhere)
                if not always_after and operation != "remove":
                    assert names(place) == ["folder"] and texts["a"] == "old a", (operation, number)
    assert any(outcomes) and not all(outcomes)


def test_a_full_disk_and_a_failed_rename_leave_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of 64 bytes for a file stands for a full disk; then the rename fails."""
    path = epath.Path(tmp_path) / "file"
    storage.write_atomic(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            storage.write_atomic(path, b"x" * 1000)
        with pytest.raises(OSError), storage.atomic_folder(tmp_path / "folder") as building:
            (building / "file").write_bytes(b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        storage.write_atomic(path, "new")
    with pytest.raises(OSError, match="disk gone"), storage.atomic_local_file(path) as name:
        pathlib.Path(name).write_text("new")
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_overwriting_keeps_the_old_folder_when_the_block_raises(tmp_path: pathlib.Path) -> None:
    with storage.atomic_folder(tmp_path / "folder") as building:
        (building / "file").write_text("old")
    with pytest.raises(ValueError), storage.atomic_folder(tmp_path / "folder", overwrite=True):
        raise ValueError
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_overwriting_restores_the_old_folder_when_the_swap_fails(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storage.atomic_folder(tmp_path / "folder") as building:
        (building / "file").write_text("old")
    rename = type(building).rename

    def fail_for_the_new_folder(path: epath.Path, target: epath.Path) -> epath.Path:
        if ".tmp-" in path.name:
            raise OSError("disk gone")
        return rename(path, target)

    monkeypatch.setattr(type(building), "rename", fail_for_the_new_folder)
    with pytest.raises(OSError, match="disk gone"), storage.atomic_folder(tmp_path / "folder", overwrite=True):
        pass
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def _raise_interrupt(descriptor: int) -> None:
    raise KeyboardInterrupt
