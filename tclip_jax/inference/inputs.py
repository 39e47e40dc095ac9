"""What is to be embedded: image files and texts, each with a key that changes with its content."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from tclip_jax.data.files import SkippedFiles, is_image, read_lines, walk
from tclip_jax.data.sources import BadSample
from tclip_jax.storage import is_local

_logger = logging.getLogger(__name__)


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
        if isinstance(error, BadSample):  # its own text begins with the name
            error = error.__cause__ if isinstance(error.__cause__, OSError) else ValueError(error.reason)
        return cls(name, " ".join(str(getattr(error, "strerror", None) or error).split()))


def find_images(folder: epath.PathLike) -> list[epath.Path]:
    """The images in a folder and all below it, in the order of their paths; the log counts what is passed over.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds no image.
    """
    folder, passed, found = epath.Path(folder), SkippedFiles(), list[epath.Path]()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for root, _, files in walk(folder, passed):
        for name in files:
            found.append(root / name) if is_image(name) else passed.add(os.path.join(root, name))
    if not found:
        raise ValueError(f"{folder}: no images in it or below{f' ({passed})' if passed.kinds else ''}")
    if passed.kinds:
        _logger.warning("%s: %s", folder, passed)
    return sorted(found, key=os.fspath)


def find_texts(path: epath.PathLike) -> tuple[list[str], int]:
    """The lines of a text file that are not blank, and how many before the last of them are; the log says so too.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or has nothing but blank lines; one line that names the file.
    """
    lines = read_lines(path)
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"{path}: no line of text in it")
    while not lines[-1]:
        lines.pop()
    if left_out := len(lines) - len(texts):
        first = lines.index("") + 1
        _logger.warning("%s: %s blank line%s left out; first line %s", path, left_out, "s" * (left_out > 1), first)
    return texts, left_out


def image_items(
    mark: str, paths: Sequence[epath.Path], root: epath.Path | None = None
) -> tuple[list[Item], list[Failure]]:
    """Items of image files, named by their path or, below `root`, from there, and the files that cannot be found.

    A file is taken to be the same if its path, size, both times of change and inode are: one that was put in its place,
    or written to, is told even where it has the same size and modification time. On object stores size and time tell.

    Args:
      mark: what makes embeddings of them, as of `embeddings_mark`.
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


def _key(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _stamp(path: epath.Path) -> str:
    if is_local(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    remote = path.stat()
    return f"{remote.length} {remote.mtime}"
