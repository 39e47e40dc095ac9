"""Folders and text files from users: walking a folder, reading lines, and counting the files that are skipped."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from tclip_jax.data.images import SUFFIXES
from tclip_jax.pages import printable
from tclip_jax.storage import is_local

_MAX_KINDS = 20
_MAX_TEXT = 1 << 30  # bytes
# First bytes of compressed files -> the format and the command that unpacks it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"\xfd7zXZ\0": ("xz", "xz -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dk"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
}


@dataclasses.dataclass
class SkippedFiles:
    """A count of the files that belong to no sample.

    Attributes:
      kinds: the number of files of each kind, which is a suffix or a description.
      first: name of the first file.
    """

    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    first: str = ""

    def add(self, name: str, kind: str = "") -> None:
        """Count a file, by default under its suffix."""
        self.update({kind or suffix(name) or "without a suffix": 1}, printable(name))

    def update(self, kinds: dict[str, int], first: str) -> None:
        """Add the fields of another count. After 20 kinds, new kinds count as "others"."""
        self.first = self.first or first
        for kind, count in kinds.items():
            kind = kind if kind in self.kinds or len(self.kinds) < _MAX_KINDS else "others"
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def __str__(self) -> str:
        count = sum(self.kinds.values())
        by_count = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{number:,} {printable(kind)[:40]}" for kind, number in by_count)
        return f"{count:,} file{'s' * (count > 1)} skipped: {kinds}; first {self.first[:200]}" if count else ""


def suffix(name: str) -> str:
    """Return the suffix of a file name in lower case with its dot, or ""."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file name has an image suffix."""
    return suffix(name) in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to the operating system, such as .DS_Store, ._x.jpg and __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def walk(root: epath.Path, skipped: SkippedFiles) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    """Yield a folder and all folders below it, each with the sorted names of its subfolders and of its files.

    Hidden files and folders are skipped. Links to folders are followed, except a link to a folder that contains the
    link.

    Args:
      root: the first folder.
      skipped: counts what is skipped.

    Raises:
      OSError: a folder cannot be read.
    """
    local = is_local(root)
    tree = os.walk(root, onerror=_raise, followlinks=True) if local else root.walk(on_error=_raise)
    for folder, folders, files in tree:
        for name in sorted(files):
            if is_hidden(name):
                skipped.add(os.path.join(folder, name), "hidden")
        folders.sort()
        for name in list(folders):
            path = os.path.join(folder, name)
            is_loop = local and os.path.islink(path) and _links_to_parent(path)
            if is_loop or is_hidden(name):
                skipped.add(path, "link to a parent folder" if is_loop else "hidden folder")
                folders.remove(name)  # in place, so that the walk does not enter it
        yield epath.Path(folder), list(folders), sorted(name for name in files if not is_hidden(name))


def _links_to_parent(link: str) -> bool:
    target, folder = (pathlib.Path(os.path.realpath(path)) for path in (link, os.path.dirname(link)))
    return target == folder or target in folder.parents


def _raise(error: OSError) -> Any:
    raise error


def split_lines(text: str) -> list[str]:
    """Split a text into lines at \\n, \\r\\n and \\r, as open() does.

    `str.splitlines` also splits at U+2028, \\x0b, \\x0c, \\x85 and others, which occur inside captions.
    """
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path: epath.PathLike, max_bytes: int = _MAX_TEXT) -> list[str]:
    """Read the lines of a UTF-8 file, blank lines included, and strip white space from each.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not UTF-8, or larger than `max_bytes`. The message is one line and names the file.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir() or (is_local(path) and not os.path.isfile(path)):
        raise ValueError(f"{path}: not a text file")
    if (size := path.stat().length) > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, where at most {max_bytes:,} are expected")
    try:
        return [line.strip() for line in split_lines(decode_text(path.read_bytes()))]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decode_text(data: bytes) -> str:
    """Decode UTF-8 bytes and remove a byte-order mark.

    Raises:
      ValueError: the bytes are not UTF-8. The message names the line and the likely format.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            line = len(split_lines(text.partition("\0")[0] + "."))
            raise ValueError(f"line {line} has a NUL byte: not a text file")
        return text
    except UnicodeDecodeError as error:
        line = len(split_lines(data[: error.start].decode("utf-8", "replace") + "."))
        if name := compression(data):
            raise ValueError(f"compressed with {name}") from None
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is UTF-16: convert it to UTF-8 (iconv -f utf-16 -t utf-8)") from None
        if b"\0" in data:
            raise ValueError("it has NUL bytes: not a text file") from None
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): if it is Latin-1, convert it to UTF-8 "
            "(iconv -f latin1 -t utf-8)"
        ) from None


def compression(head: bytes) -> str:
    """Return the compression format of a file with these first bytes and how to unpack it; "" if not compressed."""
    names = next((names for magic, names in _COMPRESSED.items() if head.startswith(magic)), None)
    return f"{names[0]}: unpack it first ({names[1]})" if names else ""
