"""The members of tar files, without believing what their headers say."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

# As webdataset does: of several images in a sample the first of these counts; all after the first dot is the suffix.
IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A file in a tar: its key and suffix, and where its header and its bytes lie."""

    key: str
    suffix: str
    header: int
    start: int
    stop: int


def members(file: IO[bytes]) -> Iterator[Member]:
    """The files of a tar that have a key and a suffix, in order.

    Raises:
      tarfile.TarError: after the last whole one, if the tar is cut or damaged.
    """
    size, end = file.seek(0, io.SEEK_END), 0
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            start, stop = member.offset_data, member.offset_data + member.size
            # A header may lie about its size: beyond the file, or backwards, which would never end.
            if not end <= start <= stop <= size:
                raise tarfile.TarError(f"{member.name[:80]!r} does not lie within the file")
            end = stop
            tar.members = []  # type: ignore[attr-defined]  # it would keep every one
            name = _NAME.fullmatch(member.name)
            if member.isreg() and not member.issparse() and name and not _META.match(member.name):
                yield Member(name[1], name[2].lower(), member.offset, start, stop)
        file.seek(tar.offset)
        # tarfile takes a damaged header for the end.
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.TarError(f"damaged header at byte {tar.offset}")
