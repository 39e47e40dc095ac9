"""Inputs to embed: image files and texts, with a key that changes with their content."""

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

_NAMED = 10  # unusable inputs that the log names

_logger = logging.getLogger(__name__)


class Item(NamedTuple):
    """An input to embed.

    Attributes:
      name: name of the input in outputs.
      key: digest of the model and the content.
      content: path of an image, or the text itself.
    """

    name: str
    key: str
    content: epath.Path | str


class Failure(NamedTuple):
    """An unusable input, and the reason."""

    name: str
    reason: str

    @classmethod
    def of(cls, name: str, error: Exception) -> Failure:
        """Return the failure of an exception, with a reason on one line."""
        if isinstance(error, BadSample):  # its message starts with the name
            error = error.__cause__ if isinstance(error.__cause__, OSError) else ValueError(error.reason)
        return cls(name, " ".join(str(getattr(error, "strerror", None) or error).split()))


def log_failures(failures: Sequence[Failure]) -> None:
    """Log the first ten unusable inputs with the reasons, and the number of the others."""
    for failure in failures[:_NAMED]:
        _logger.warning("%s: %s", failure.name, failure.reason)
    if len(failures) > _NAMED:
        _logger.warning("%s more inputs cannot be used", f"{len(failures) - _NAMED:,}")


def find_images(folder: epath.PathLike) -> list[epath.Path]:
    """Return the images in a folder and its subfolders, sorted by path. The log counts the skipped files.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: it has no image.
    """
    folder, skipped, images = epath.Path(folder), SkippedFiles(), list[epath.Path]()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for root, _, files in walk(folder, skipped):
        for name in files:
            images.append(root / name) if is_image(name) else skipped.add(os.path.join(root, name))
    if not images:
        raise ValueError(f"{folder}: no images in it or its subfolders{f' ({skipped})' if skipped.kinds else ''}")
    if skipped.kinds:
        _logger.warning("%s: %s", folder, skipped)
    return sorted(images, key=os.fspath)


def find_texts(path: epath.PathLike) -> tuple[list[str], int]:
    """Read the non-blank lines of a text file.

    Returns:
      The lines, and the number of blank lines before the last one of them, which the log reports too.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8, or has only blank lines.
    """
    lines = read_lines(path)
    texts = [line for line in lines if line]
    if not texts:
        raise ValueError(f"{path}: it has no line of text")
    while not lines[-1]:
        lines.pop()
    if left_out := len(lines) - len(texts):
        first = lines.index("") + 1
        _logger.warning("%s: %s blank line%s left out; first line %s", path, left_out, "s" * (left_out > 1), first)
    return texts, left_out


def image_items(
    mark: str, paths: Sequence[epath.Path], root: epath.Path | None = None
) -> tuple[list[Item], list[Failure]]:
    """Return the items of image files, and the files that cannot be found.

    The key of a local file changes with its path, size, modification time, change time and inode, so a replaced or
    rewritten file is detected even if its size and modification time are the same. On object stores, the key changes
    with path, size and modification time.

    Args:
      mark: identity of the model; see `embeddings_mark`.
      paths: the files.
      root: names are relative to this folder; None for whole paths.
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
    """Return the items of texts. The name of an item is its text."""
    return [Item(text, _key(mark, "text", text), text) for text in texts]


def _key(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _stamp(path: epath.Path) -> str:
    if is_local(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    remote = path.stat()
    return f"{remote.length} {remote.mtime}"
