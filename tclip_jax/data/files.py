"""Files as people hand them over: the folders they lie in, the lines of a text, and a count of what is passed over."""

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
# First bytes of compressed files, and what unpacks them.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dk"),
    b"\xfd7zXZ\0": ("xz", "xz -dk"),
    b"BZh": ("bzip2", "bzip2 -dk"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dk"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"),
}


@dataclasses.dataclass
class PassedOver:
    """Files that belong to no sample: how many of each kind, and the first of them."""

    kinds: dict[str, int] = dataclasses.field(default_factory=dict)
    first: str = ""

    def add(self, name: str, kind: str = "") -> None:
        """Counts a file, by its suffix unless `kind` says what it is."""
        self.update({kind or suffix(name) or "without a suffix": 1}, printable(name))

    def update(self, kinds: dict[str, int], first: str) -> None:
        """Adds what was passed over elsewhere."""
        self.first = self.first or first
        for kind, count in kinds.items():
            kind = kind if kind in self.kinds or len(self.kinds) < _MAX_KINDS else "others"
            self.kinds[kind] = self.kinds.get(kind, 0) + count

    def __str__(self) -> str:
        count = sum(self.kinds.values())
        often = sorted(self.kinds.items(), key=lambda each: (-each[1], each[0]))
        kinds = ", ".join(f"{number:,} {printable(kind)[:40]}" for kind, number in often)
        return f"{count:,} file{'s' * (count > 1)} passed over: {kinds}; first {self.first[:200]}" if count else ""


def suffix(name: str) -> str:
    """The suffix of a file name in small letters, with its dot; "" of none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return suffix(name) in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's own: .DS_Store, ._x.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def walk(root: epath.Path, passed: PassedOver) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    """A folder and every one below it, with the names of the folders and files in each; hidden ones are passed over.

    Links to folders are followed, but for those to a folder that they lie in.

    Raises:
      OSError: a folder that cannot be read.
    """
    local = is_local(root)
    found = os.walk(root, onerror=_raise, followlinks=True) if local else root.walk(on_error=_raise)
    for folder, folders, files in found:
        for name in sorted(files):
            if is_hidden(name):
                passed.add(os.path.join(folder, name), "hidden")
        folders.sort()
        for name in list(folders):
            path = os.path.join(folder, name)
            above = local and os.path.islink(path) and _is_above(path)
            if above or is_hidden(name):
                passed.add(path, "link to a folder above" if above else "hidden folder")
                folders.remove(name)  # in place: the walk then leaves it out, and keeps to the order
        yield epath.Path(folder), list(folders), sorted(name for name in files if not is_hidden(name))


def _is_above(link: str) -> bool:
    target, place = (pathlib.Path(os.path.realpath(path)) for path in (link, os.path.dirname(link)))
    return target == place or target in place.parents


def _raise(error: OSError) -> Any:
    raise error


def split_lines(text: str) -> list[str]:
    """The lines of a text, as open() splits them: at \\n, \\r\\n and \\r.

    `str.splitlines` splits at U+2028, \\x0b, \\x0c, \\x85 and more, which stand within captions.
    """
    lines = re.split("\r\n|\n|\r", text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path: epath.PathLike, max_bytes: int = _MAX_TEXT) -> list[str]:
    """The lines of a UTF-8 file, blank ones too, without white space around them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not UTF-8, or has more than `max_bytes`; one line that names the file.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir() or (is_local(path) and not os.path.isfile(path)):
        raise ValueError(f"{path}: no file of text")
    if (size := path.stat().length) > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, where at most {max_bytes:,} are expected")
    try:
        return [line.strip() for line in split_lines(decode_text(path.read_bytes()))]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decode_text(data: bytes) -> str:
    """UTF-8 bytes as text, without a byte-order mark.

    Raises:
      ValueError: they are not UTF-8; the line where they are not, and what they may be.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError(f"line {len(split_lines(text.partition(chr(0))[0] + '.'))} has a NUL byte: no text")
        return text
    except UnicodeDecodeError as error:
        line = len(split_lines(data[: error.start].decode("utf-8", "replace") + "."))
        if name := compression(data):
            raise ValueError(f"compressed with {name}") from None
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError("it is UTF-16: convert it to UTF-8 (iconv -f utf-16 -t utf-8)") from None
        if b"\0" in data:
            raise ValueError("it has NUL bytes: no text") from None
        raise ValueError(
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): in Latin-1? Convert it to UTF-8 "
            "(iconv -f latin1 -t utf-8)"
        ) from None


def compression(head: bytes) -> str:
    """How a file that begins so is compressed, and what unpacks it; "" if it is not."""
    found = next((names for magic, names in _COMPRESSED.items() if head.startswith(magic)), None)
    return f"{found[0]}: unpack it first ({found[1]})" if found else ""
