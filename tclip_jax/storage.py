"""Files and folders that are there whole or not at all, on local disks and on object stores."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from etils import epath


def is_local(path: epath.Path) -> bool:
    """Whether renaming is atomic there: true for a local path, false for gs:// and its like."""
    return "://" not in os.fspath(path)


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Writes one file so that readers and crashes find the old content or the new, never a part of it.

    A local file is written beside, synced and renamed; an object store shows an upload only when it is complete.
    """
    path, data = epath.Path(path), data.encode() if isinstance(data, str) else data
    if not is_local(path):
        path.write_bytes(data)
        return
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields an open file that becomes `path` when the block ends, whole, and nothing if it raises.

    What is too large for memory is written with it. On an object store the file is written in its place, and removed if
    the block raises.
    """
    path = epath.Path(path)
    if is_local(path) and not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, so {path.name} cannot be written there")
    building = _beside(path, "tmp") if is_local(path) else path
    try:
        with building.open("wb") as file:
            yield file
        if is_local(path):
            _sync(building)
            building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise
    if is_local(path):
        _sync(path.parent)


@contextlib.contextmanager
def atomic_local_file(path: epath.PathLike) -> Iterator[str]:
    """As `atomic_file`, for writers that must open the file themselves: yields the name of a local one."""
    path = epath.Path(path)
    if is_local(path):
        building = _beside(path, "tmp")
        try:
            yield os.fspath(building)
            _sync(building)
            building.replace(path)
        except BaseException:
            building.unlink(missing_ok=True)
            raise
        _sync(path.parent)
        return
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, path.name)
        yield name
        with open(name, "rb") as file, atomic_file(path) as there:
            shutil.copyfileobj(file, there)


@contextlib.contextmanager
def atomic_folder(path: epath.PathLike, *, overwrite: bool = False) -> Iterator[epath.Path]:
    """Yields an empty folder to fill, which becomes `path` when the block ends and is removed if it raises.

    A local folder is filled beside, synced and renamed, and only then is an overwritten one removed. An object store
    renames nothing: there the folder is filled in place, so its reader must require the file that is written last.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false.
    """
    path = epath.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another folder, or --overwrite it")
    building = _beside(path, "tmp") if is_local(path) else path
    if building.exists():
        building.rmtree()
    try:
        building.mkdir(parents=True, exist_ok=True)
        yield building
        if is_local(path):
            sync_tree(building)
            _swap(building, path)
    except BaseException:
        building.rmtree(missing_ok=True)
        raise


def _swap(new: epath.Path, path: epath.Path) -> None:
    """Renames `new` to `path`; what was there stays whole beside it until that is done."""
    old = _beside(path, "old") if path.exists() else None
    if old:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old:
            old.rename(path)
        raise
    _sync(path.parent)
    if old:
        old.rmtree()


def _beside(path: epath.Path, why: str) -> epath.Path:
    return path.parent / f"{path.name}.{why}-{secrets.token_hex(4)}"


def sync_tree(folder: epath.Path) -> None:
    """Waits until a local folder and all below it are on disk."""
    for path in folder.iterdir():
        sync_tree(path) if path.is_dir() else _sync(path)
    _sync(folder)


def _sync(path: epath.Path) -> None:
    """Waits until the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
