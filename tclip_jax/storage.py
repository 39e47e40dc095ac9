"""Files and folders that are there whole or not at all, on local disks and on object stores; JSON; the cache folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

_logger = logging.getLogger(__name__)


def is_local(path: epath.Path) -> bool:
    """Whether renaming is atomic there: true for a local path, false for gs:// and its like."""
    return "://" not in os.fspath(path)


def cache_folder() -> pathlib.Path:
    """Where what can be made again lies on this machine (indices, copies of remote data, compiled plans).

    It is TCLIP_CACHE_DIR, by default ~/.cache/tclip_jax.
    """
    return pathlib.Path(os.environ.get("TCLIP_CACHE_DIR") or "~/.cache/tclip_jax").expanduser()


def dump_json(content: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """JSON and a line break, in one line without `indent`; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Writes one file so that readers and crashes find the old content or the new, never a part of it."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yields an open file that becomes `path` when the block ends, whole, and nothing if it raises.

    It is written under another name beside `path`, and renamed: until that is done the old file is there. Object stores
    too show what is renamed only when it is complete; what is half written they may show when it is closed.
    """
    path = epath.Path(path)
    _check_parent(path)
    building = _beside(path, "tmp")
    try:
        with building.open("wb") as file:
            yield file
        if is_local(path):
            _sync(building)
        building.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # of what went wrong first there is more to say
            building.unlink(missing_ok=True)
        raise
    if is_local(path):
        _sync(path.parent)


@contextlib.contextmanager
def atomic_local_file(path: epath.PathLike) -> Iterator[str]:
    """As `atomic_file`, for writers that must open the file themselves: yields the name of a local one."""
    path = epath.Path(path)
    _check_parent(path)
    if is_local(path):
        building = _beside(path, "tmp")
        try:
            yield os.fspath(building)
            _sync(building)
            building.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
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

    It is filled beside `path` and renamed, and only then is an overwritten one removed. An object store renames by
    copying: who is killed in that moment leaves what was overwritten whole as `<path>.old-…`, and a reader tells a copy
    that is not complete by the checksums in the folder.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false.
    """
    path = epath.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another folder, or --overwrite it")
    building = _beside(path, "tmp")
    try:
        building.mkdir(parents=True, exist_ok=True)
        yield building
        if is_local(path):
            sync_tree(building)
        _swap(building, path)
    except BaseException:
        with contextlib.suppress(OSError):
            building.rmtree(missing_ok=True)
        raise


def _swap(new: epath.Path, path: epath.Path) -> None:
    """Renames `new` to `path`; what was there stays whole beside it until that is done."""
    if not path.exists():
        new.rename(path)
    else:
        old, before = _beside(path, "old"), _lengths(path)
        try:
            path.rename(old)
            new.rename(path)
        except BaseException as error:
            try:
                _put_back(old, path, before)
            except OSError:
                raise OSError(f"{path}: {error}; what was there is whole in {old}") from error
            raise
        try:
            old.rmtree()
        except OSError as error:
            _logger.warning("%s: what was overwritten could not be removed: %s", old, error)
    if is_local(path):
        _sync(path.parent)


def _put_back(old: epath.Path, path: epath.Path, before: dict[str, int]) -> None:
    """Undoes half a `_swap`: `path` or `old` is whole, since an object store copies all before it removes the first."""
    if path.exists() and _lengths(path) == before:
        old.rmtree(missing_ok=True)
    elif old.exists():
        path.rmtree(missing_ok=True)
        old.rename(path)


def _lengths(folder: epath.Path) -> dict[str, int]:
    """Of all files in a folder and below it, by name."""
    lengths: dict[str, int] = {}
    for path in folder.iterdir():
        below = {f"{path.name}/{name}": size for name, size in _lengths(path).items()} if path.is_dir() else {}
        lengths |= below or {path.name: 0 if path.is_dir() else path.stat().length}
    return lengths


def _check_parent(path: epath.Path) -> None:
    if is_local(path) and not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, so {path.name} cannot be written there")


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
