"""Tars of images and captions, as img2dataset writes them for webdataset, at random access.

`members` reads the headers of any tar; exports of CLIP_benchmark (webdataset.py) use it too.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.data.files import SkippedFiles, compression, is_hidden
from tclip_jax.data.images import SUFFIXES
from tclip_jax.data.sources.base import (
    FAULTS,
    MAX_SAMPLE_BYTES,
    OPEN_CLIP_ORDER,
    BadSample,
    Fault,
    Record,
    decode_caption,
)
from tclip_jax.data.sources.remote import open_file, read_range, retry
from tclip_jax.data.sources.shard_index import SAMPLE, Scan, ShardIndex
from tclip_jax.pages import printable

_HEADERS = 8192  # bytes that hold a member's header and the extended headers of a long name
_METADATA = re.compile(r"__[^/]*__($|/)")
_REASONS: dict[Fault, str] = {
    "no_image": f"no image ({', '.join(OPEN_CLIP_ORDER)} or another format), or an empty one",
    "no_caption": "no caption (txt), or an empty one",
    "duplicate_key": "its key, or one of its files, occurs twice",
    "unsafe_name": "its name points outside the folder",
    "too_large": f"its image and caption span more than {MAX_SAMPLE_BYTES:,} bytes of the tar",
}


class Tars:
    """The samples of many tars: an image and a `.txt` with its caption, next to each other under one key.

    The samples are those of open_clip's training: the image is the first of jpg, png, jpeg and webp, or an image of
    another format, and the whole text is one caption.

    The headers are read once, into an index in the cache folder. A sample is then one read. Samples of remote stores
    are cached. A sample is bad if its image or caption is missing, its key occurred before, or its name points outside
    the folder. One more bad sample stands for the rest of a damaged shard.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, index: ShardIndex) -> None:
        self._index, self.notes = index, index.notes

    @property
    def digest(self) -> str:
        """Digest of the contents of the tars."""
        return self._index.digest

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        shard, row = self._index.locate(index)
        path, name = self._index.shards[shard], f"{self._index.shards[shard]}/{row}"
        start, image, image_size, text, text_size, fault, _ = self._index.sample(index).item()
        kind: Any = FAULTS[fault] if fault else "no_image" if not image_size else "no_caption"
        if fault or not (image_size and text_size):
            key = _key_at(path, start)
            # A key that occurs again needs its position too: bad samples are listed by name.
            name = f"{path}/{key} (sample {row})" if key and kind == "duplicate_key" else f"{path}/{key or row}"
            raise BadSample(kind, name, _REASONS[kind])
        stop = max(image + image_size, text + text_size)
        data = read_range(path, start, start + stop, stamp=self._index.stamps[shard], name=name)
        try:
            name = f"{path}/{first_key(data)}"
        except tarfile.TarError as error:
            raise BadSample("broken_shard", name, f"the shard differs from its index: {error}") from None
        caption = decode_caption(data[text : text + text_size], name)
        return Record(data[image : image + image_size], (caption,) if caption else (), -1, name)


def scan(path: str) -> Scan:
    """Find the samples of a tar.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the tar is compressed.
    """
    try:
        return retry(lambda: _scan(path), path)
    except BadSample as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such file") from None
        if error.kind == "broken_shard":
            raise ValueError(str(error)) from None
        return Scan(-1, 1, FAULTS.index("unreadable"), np.zeros(1, SAMPLE))


def _scan(path: str) -> Scan:
    files, skipped = list[Member](), SkippedFiles()
    fault: Fault | None = None
    with open_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        try:
            for member in members(file, skipped):
                files.append(member)
        except tarfile.TarError:
            file.seek(0)
            if name := compression(file.read(8)):
                raise BadSample("broken_shard", path, f"compressed with {name}") from None
            fault = "broken_shard" if size else "empty_shard"
    rows = list(_samples(files, skipped))
    if not rows and fault is None:
        fault = "empty_shard"
    if fault:
        rows.append(np.zeros((), SAMPLE))
    return Scan(size, len(rows), FAULTS.index(fault) if fault else 0, np.array(rows, SAMPLE), skipped)


def _samples(files: Sequence[Member], skipped: SkippedFiles) -> Iterator[npt.NDArray[np.void]]:
    """Yield a SAMPLE for each run of files with one key. A repeated suffix within a run starts another sample."""
    keys: set[str] = set()
    for key, run in itertools.groupby(files, lambda member: member.key):
        samples: list[dict[str, Member]] = [{}]
        for member in run:
            if member.suffix in samples[-1]:
                samples.append({})
            samples[-1][member.suffix] = member
        unsafe = key.startswith("/") or ".." in key.split("/")
        for by_suffix in samples:
            image, text = select_image(by_suffix, OPEN_CLIP_ORDER), by_suffix.get("txt")
            skip_unused(by_suffix, (image, text), skipped)
            yield _sample(image, text, "unsafe_name" if unsafe else "duplicate_key" if key in keys else None)
            keys.add(key)


def _sample(image: Member | None, text: Member | None, fault: Fault | None) -> npt.NDArray[np.void]:
    files = [member for member in (image, text) if member]
    start = min((member.header for member in files), default=0)
    too_large = max((member.stop for member in files), default=0) - start > MAX_SAMPLE_BYTES
    if fault or too_large:
        return np.array((start, 0, 0, 0, 0, FAULTS.index(fault or "too_large"), b""), SAMPLE)
    spans = [(member.start - start, member.stop - member.start) if member else (0, 0) for member in (image, text)]
    return np.array((start, *spans[0], *spans[1], 0, b""), SAMPLE)


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
      key: its name up to the first dot of the file name; the files of a sample have one key.
      suffix: the rest of its name in lower case, without the dot.
      header: byte at which its header starts.
      start, stop: its bytes [start, stop).
    """

    key: str
    suffix: str
    header: int
    start: int
    stop: int


def members(file: IO[bytes], skipped: SkippedFiles) -> Iterator[Member]:
    """Yield the files of a tar that have a key and a suffix, in order. Nothing in a header is trusted.

    Args:
      file: the open tar.
      skipped: counts all other files; folders are not counted.

    Raises:
      tarfile.TarError: the tar is truncated or damaged; raised after the last complete member.
    """
    size, end = file.seek(0, io.SEEK_END), 0
    file.seek(0)
    with _only_tar_errors(), tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            start, stop = member.offset_data, member.offset_data + member.size
            # A false size may point beyond the file, or backwards, which would never end.
            if not end <= start <= stop <= size:
                raise tarfile.TarError(f"{member.name[:80]!r} does not lie within the file")
            end = stop
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all members in memory
            name = split_name(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                skipped.add(member.name, "link, device or sparse file")
            elif _METADATA.match(member.name):
                skipped.add(member.name, "webdataset metadata (__…__)")
            # webdataset reads the ._x.jpg that macOS adds next to x.jpg as another sample, which splits x in two.
            elif is_hidden(member.name.rpartition("/")[2]) or "__MACOSX" in member.name.split("/"):
                skipped.add(member.name, "hidden")
            elif not name:
                skipped.add(member.name, "without a suffix")
            else:
                yield Member(name[0], name[1].lower(), member.offset, start, stop)
        file.seek(tar.offset)
        # tarfile reads a damaged header as the end of the tar.
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.TarError(f"damaged header at byte {tar.offset}")


def select_image(files: Mapping[str, Member], order: Sequence[str]) -> Member | None:
    """Return the image among the files of a sample, by suffix: the first in `order`, else any image format."""
    others = (suffix for suffix in sorted(files) if f".{suffix}" in SUFFIXES)
    return next((files[suffix] for suffix in (*order, *others) if suffix in files), None)


def skip_unused(files: Mapping[str, Member], used: Sequence[Member | None], skipped: SkippedFiles) -> None:
    """Count the files of a sample that are not used."""
    for member in files.values():
        if member not in used:
            skipped.add(f"{member.key}.{member.suffix}", f".{member.suffix}")


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a member into key and suffix as webdataset does: at the first dot after the last slash.

    Returns None for a file that belongs to no sample. webdataset's pattern `((?:.*/|)[^.]+)[.]([^/]*)` is equivalent,
    but takes quadratic time, and a header may have a name of a million characters.
    """
    dot = name.find(".", name.rfind("/") + 1)
    rooted = f"/{name[:dot]}"
    if dot < 0 or "/" not in rooted[rooted.rfind(".") + 1 : -1]:
        return None
    return name[:dot], name[dot + 1 :]


def _key_at(path: str, start: int) -> str:
    """Return the key of the member whose header is at byte `start` of a tar; "" if it cannot be read."""
    try:
        with open_file(path) as file:
            file.seek(start)
            return printable(first_key(file.read(_HEADERS)))
    except Exception:  # the libraries of stores raise any type, and the position names the sample too
        return ""


def first_key(data: bytes) -> str:
    """Return the key of the member whose header starts `data`. Characters that are not UTF-8 are replaced.

    Raises:
      tarfile.TarError: `data` does not start with the header of a file of a sample.
    """
    file = io.BytesIO(data)
    with _only_tar_errors(), tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
        member = tar.next()
    if member is None or not (name := split_name(member.name)):
        raise tarfile.TarError("no file of a sample starts there")
    return name[0]


@contextlib.contextmanager
def _only_tar_errors() -> Iterator[None]:
    """Convert to TarError what tarfile raises for a header's number that is invalid or too large for memory."""
    try:
        yield
    except (ValueError, OverflowError, MemoryError) as error:
        raise tarfile.TarError(f"damaged header ({type(error).__name__}: {error})") from None
