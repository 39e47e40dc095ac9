"""Atomic writes of files and folders on local disks and object stores; JSON; the cache folder.

Hand-written: etils writes in place, and fsspec's transactions neither sync to disk nor replace folders.
"""

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
    """Whether `path` is on a local file system, where a rename is atomic; false for gs:// and other URIs."""
    return "://" not in os.fspath(path)


def cache_folder() -> pathlib.Path:
    """Return this machine's folder of indices, copies of remote data and compiled plans; it can be deleted.

    TCLIP_CACHE_DIR sets it; the default is ~/.cache/tclip_jax.
    """
    return pathlib.Path(os.environ.get("TCLIP_CACHE_DIR") or "~/.cache/tclip_jax").expanduser()


def dump_json(content: Mapping[str, Any], *, indent: int | None = 2) -> str:
    """Return `content` as JSON with a final newline; one line if `indent` is None. NaN and infinity become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: epath.PathLike, data: bytes | str) -> None:
    """Write one file atomically: readers get the old content or the new, also after a crash."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yield an open binary file that becomes `path` when the block ends; if the block raises, `path` is unchanged.

    The data go to a temporary name beside `path`, which is then renamed. Object stores need this too: closing a file
    after a failed upload can publish a part of it, but a copy appears only when it is complete.

    Raises:
      FileNotFoundError: the local folder of `path` does not exist.
      OSError: the file cannot be written; the old file is unchanged.
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
        with contextlib.suppress(OSError):  # the first error tells more
            building.unlink(missing_ok=True)
        raise
    if is_local(path):
        _sync(path.parent)


@contextlib.contextmanager
def atomic_local_file(path: epath.PathLike) -> Iterator[str]:
    """Yield the name of a local file that becomes `path`: `atomic_file` for libraries that open files by name."""
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
        with open(name, "rb") as file, atomic_file(path) as target:
            shutil.copyfileobj(file, target)


@contextlib.contextmanager
def atomic_folder(path: epath.PathLike, *, overwrite: bool = False) -> Iterator[epath.Path]:
    """Yield an empty folder that becomes `path` when the block ends; if the block raises, the folder is removed.

    The folder has a temporary name beside `path` until it is renamed; the folder that it replaces is removed last.
    Object stores rename by copying. A process that is killed during this copy leaves the old folder whole as
    `<path>.old-…` and the new one incomplete, which readers detect by the checksums in it.

    Args:
      path: the final folder.
      overwrite: replace an existing folder.

    Raises:
      FileExistsError: `path` exists and `overwrite` is false.
      OSError: the folder cannot be written; the message names the old one if it is not at `path`.
    """
    path = epath.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another folder or pass --overwrite")
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
    """Rename `new` to `path`; the old folder at `path` stays whole beside it until then."""
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
                raise OSError(f"{path}: {error}; the old folder is whole in {old}") from error
            raise
        try:
            old.rmtree()
        except OSError as error:
            _logger.warning("%s: cannot remove this overwritten folder: %s", old, error)
    if is_local(path):
        _sync(path.parent)


def _put_back(old: epath.Path, path: epath.Path, before: dict[str, int]) -> None:
    """Undo half a `_swap`. `path` or `old` is whole: an object store copies all files before it removes the first."""
    if path.exists() and _lengths(path) == before:
        old.rmtree(missing_ok=True)
    elif old.exists():
        path.rmtree(missing_ok=True)
        old.rename(path)


def _lengths(folder: epath.Path) -> dict[str, int]:
    """Return the bytes of every file below `folder`, by relative path; 0 for an empty folder."""
    lengths: dict[str, int] = {}
    for path in folder.iterdir():
        below = {f"{path.name}/{name}": size for name, size in _lengths(path).items()} if path.is_dir() else {}
        lengths |= below or {path.name: 0 if path.is_dir() else path.stat().length}
    return lengths


def _check_parent(path: epath.Path) -> None:
    if is_local(path) and not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder, so {path.name} cannot be written there")


def _beside(path: epath.Path, kind: str) -> epath.Path:
    return path.parent / f"{path.name}.{kind}-{secrets.token_hex(4)}"


def sync_tree(folder: epath.Path) -> None:
    """Flush a local folder and everything below it to disk (fsync)."""
    for path in folder.iterdir():
        sync_tree(path) if path.is_dir() else _sync(path)
    _sync(folder)


def _sync(path: epath.Path) -> None:
    """Flush a file, or the names in a folder, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
