"""What is to be embedded: image files and texts, each with a key that changes with its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from tclip_jax.storage import is_local

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


class Item(NamedTuple):
    """Something to embed: its name, a key of the model and the content, and where the content is, or the text."""

    name: str
    key: str
    content: epath.Path | str


class Failure(NamedTuple):
    """An input that could not be used, and why."""

    name: str
    reason: str

    @classmethod
    def of(cls, name: str, error: Exception) -> Failure:
        """The failure that an exception means, on one line."""
        return cls(name, " ".join(str(getattr(error, "strerror", None) or error).split()))


def find_images(folder: epath.PathLike) -> list[epath.Path]:
    """The images in a folder and all below it, in the order of their paths; hidden names are passed over.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no image.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sorted(_walk(folder), key=os.fspath)
    if not found:
        raise ValueError(f"{folder}: no images in it or below ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for root, folders, files in folder.walk():
        # In place: the walk then passes them over.
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (root / name for name in files if not name.startswith("."))
        yield from (path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES)


def image_items(
    mark: str, paths: Sequence[epath.Path], root: epath.Path | None = None
) -> tuple[list[Item], list[Failure]]:
    """Items of image files, named by their path or, below `root`, from there, and the files that cannot be found.

    A file that has the same path, size and time of change is taken to be the same.

    Args:
      mark: the model's fingerprint.
    """
    items, failures = [], []
    for path in paths:
        name = os.path.relpath(path, root) if root else os.fspath(path)
        try:
            key = _key(mark, "image", os.path.abspath(path) if is_local(path) else os.fspath(path), _stamp(path))
        except OSError as error:
            failures.append(Failure.of(name, error))
        else:
            items.append(Item(name, key, path))
    return items, failures


def text_items(mark: str, texts: Sequence[str]) -> list[Item]:
    """Items of texts, each its own name."""
    return [Item(text, _key(mark, "text", text), text) for text in texts]


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are no UTF-8 become \\\\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _key(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _stamp(path: epath.Path) -> str:
    if is_local(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    remote = path.stat()
    return f"{remote.length} {remote.mtime}"
