"""The members of tar files, without believing what their headers say."""

from __future__ import annotations

import contextlib
import io
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from tclip_jax.data.files import PassedOver, is_hidden
from tclip_jax.data.images import SUFFIXES

# Of several images in a sample the first of these counts: in open_clip's training, and in exports of CLIP_benchmark.
OPEN_CLIP_ORDER = ("jpg", "png", "jpeg", "webp")
CLIP_BENCHMARK_ORDER = ("webp", "png", "jpg", "jpeg")
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A file in a tar: its key and suffix, and where its header and its bytes lie."""

    key: str
    suffix: str
    header: int
    start: int
    stop: int


def members(file: IO[bytes], passed: PassedOver) -> Iterator[Member]:
    """The files of a tar that have a key and a suffix, in order; others are passed over, folders without a count.

    Raises:
      tarfile.TarError: after the last whole one, if the tar is cut or damaged.
    """
    size, end = file.seek(0, io.SEEK_END), 0
    file.seek(0)
    with _only_tar_errors(), tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            start, stop = member.offset_data, member.offset_data + member.size
            # A header may lie about its size: beyond the file, or backwards, which would never end.
            if not end <= start <= stop <= size:
                raise tarfile.TarError(f"{member.name[:80]!r} does not lie within the file")
            end = stop
            tar.members = []  # type: ignore[attr-defined]  # it would keep every one
            name = split_name(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                passed.add(member.name, "link, device or sparse file")
            elif _META.match(member.name):
                passed.add(member.name, "of webdataset's own (__…__)")
            # webdataset takes the ._x.jpg that a Mac puts beside x.jpg for another sample, which tears x in two.
            elif is_hidden(member.name.rpartition("/")[2]) or "__MACOSX" in member.name.split("/"):
                passed.add(member.name, "hidden")
            elif not name:
                passed.add(member.name, "without a suffix")
            else:
                yield Member(name[0], name[1].lower(), member.offset, start, stop)
        file.seek(tar.offset)
        # tarfile takes a damaged header for the end.
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.TarError(f"damaged header at byte {tar.offset}")


def image_of(files: Mapping[str, Member], order: Sequence[str]) -> Member | None:
    """The image of a sample, of its files by suffix: the first in `order`, or else one of another format."""
    others = (suffix for suffix in sorted(files) if f".{suffix}" in SUFFIXES)
    return next((files[suffix] for suffix in (*order, *others) if suffix in files), None)


def pass_over_rest(files: Mapping[str, Member], used: Sequence[Member | None], passed: PassedOver) -> None:
    """Counts the files of a sample that are not used."""
    for member in files.values():
        if member not in used:
            passed.add(f"{member.key}.{member.suffix}", f".{member.suffix}")


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the suffix of a member, as webdataset splits its name: at the first dot after the last slash.

    None of a file that belongs to no sample. webdataset's `((?:.*/|)[^.]+)[.]([^/]*)` says the same, but takes a time
    that grows with the square of the name, and a header may give it a million letters.
    """
    dot = name.find(".", name.rfind("/") + 1)
    rooted = f"/{name[:dot]}"
    if dot < 0 or "/" not in rooted[rooted.rfind(".") + 1 : -1]:
        return None
    return name[:dot], name[dot + 1 :]


def first_key(data: bytes) -> str:
    """The key of the member with whose header, or what extends that, `data` begins; what is not UTF-8 is replaced.

    Raises:
      tarfile.TarError: there is no such member.
    """
    file = io.BytesIO(data)
    with _only_tar_errors(), tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
        member = tar.next()
    if member is None or not (name := split_name(member.name)):
        raise tarfile.TarError("no file of a sample begins there")
    return name[0]


@contextlib.contextmanager
def _only_tar_errors() -> Iterator[None]:
    """A header may hold a number that is none, or one so large that tarfile runs out of memory."""
    try:
        yield
    except (ValueError, OverflowError, MemoryError) as error:
        raise tarfile.TarError(f"damaged header ({type(error).__name__}: {error})") from None
