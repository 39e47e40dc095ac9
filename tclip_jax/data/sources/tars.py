"""Webdataset tars of images and captions, as img2dataset writes them, at random access."""

from __future__ import annotations

import glob
import io
import itertools
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tclip_jax.data.files import PassedOver, compression
from tclip_jax.data.sources.base import FAULTS, MAX_SAMPLE_BYTES, BadSample, Fault, Record, Source, decode_caption
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.data.sources.remote import open_file, read_range, retry
from tclip_jax.data.sources.shard_index import SAMPLE, Scan, ShardIndex, open_index
from tclip_jax.data.sources.tar import OPEN_CLIP_ORDER, Member, first_key, image_of, members, pass_over_rest
from tclip_jax.data.sources.webdataset import Webdataset

_REASONS: dict[Fault, str] = {
    "no_image": f"no {', '.join(OPEN_CLIP_ORDER)} beside the caption, or an empty one",
    "no_caption": "no txt beside the image, or an empty one",
    "duplicate_key": "its key, or one of its files, is there twice",
    "unsafe_name": "its name leads out of the folder",
    "too_large": f"its image and caption, with what lies between them, have more than {MAX_SAMPLE_BYTES:,} bytes",
}


_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|txz|tbz2?|tzst|zip|7z)$", re.IGNORECASE)


class Tars:
    """The samples of many tars: an image and a `.txt` with its caption, side by side under one key.

    They are those that open_clip trains on: the first of jpg, png, jpeg and webp, or else another image, and the whole
    text as one caption.

    The headers are read once, into an index in the cache folder; a sample is then one read, also from a remote store,
    and what has been read from there is kept. A sample without its image or caption, of a key that was there before, or
    of a name that leads out of a folder is a bad one, and so is the one that stands for the rest of a damaged shard.
    """

    classnames: tuple[str, ...] = ()

    def __init__(self, index: ShardIndex) -> None:
        self._index, self.notes = index, index.notes

    @property
    def digest(self) -> str:
        """Of the contents of the tars."""
        return self._index.digest

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        shard, place = self._index.locate(index)
        path, name = self._index.shards[shard], f"{self._index.shards[shard]}/{place}"
        start, image, image_size, text, text_size, fault, _ = self._index.sample(index).item()
        kind: Any = FAULTS[fault] if fault else "no_image" if not image_size else "no_caption"
        if fault or not (image_size and text_size):
            raise BadSample(kind, name, _REASONS[kind])
        stop = max(image + image_size, text + text_size)
        data = read_range(path, start, start + stop, stamp=self._index.stamps[shard], name=name)
        try:
            name = f"{path}/{first_key(data)}"
        except tarfile.TarError as error:
            raise BadSample("broken_shard", name, f"the shard is not the one that was indexed: {error}") from None
        caption = decode_caption(data[text : text + text_size], name)
        return Record(data[image : image + image_size], (caption,) if caption else (), -1, name)


def open_webdataset(argument: str, split: str) -> Source:
    """The tars of a pattern with braces, globs and `::`, local or of URLs, or the split of an export in a folder.

    Raises:
      FileNotFoundError: a tar or the folder is not there.
      ValueError: no tar can be read, one is compressed, or the folder is no export.
    """
    if _TAR.search(argument) or glob.has_magic(argument) or "{" in argument:
        return Tars(open_index("tar", find_files(argument), scan))
    return Webdataset(argument, split)


def scan(path: str) -> Scan:
    """Where the samples of one tar lie.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is compressed.
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
    found, passed = list[Member](), PassedOver()
    fault: Fault | None = None
    with open_file(path) as file:
        size = file.seek(0, io.SEEK_END)
        try:
            for member in members(file, passed):
                found.append(member)
        except tarfile.TarError:
            file.seek(0)
            if packed := compression(file.read(8)):
                raise BadSample("broken_shard", path, f"compressed with {packed}") from None
            fault = "broken_shard" if size else "empty_shard"
    rows = list(_samples(found, passed))
    if not rows and fault is None:
        fault = "empty_shard"
    if fault:
        rows.append(np.zeros((), SAMPLE))
    return Scan(size, len(rows), FAULTS.index(fault) if fault else 0, np.array(rows, SAMPLE), passed)


def _samples(found: Sequence[Member], passed: PassedOver) -> Iterator[npt.NDArray[np.void]]:
    """The SAMPLE of every run of files with one key; a file that a run has already begins another."""
    seen: set[str] = set()
    for key, run in itertools.groupby(found, lambda member: member.key):
        samples: list[dict[str, Member]] = [{}]
        for member in run:
            if member.suffix in samples[-1]:
                samples.append({})
            samples[-1][member.suffix] = member
        for files in samples:
            image, text = image_of(files, OPEN_CLIP_ORDER), files.get("txt")
            pass_over_rest(files, (image, text), passed)
            yield _sample(image, text, "unsafe_name" if _leads_out(key) else "duplicate_key" if key in seen else None)
            seen.add(key)


def _leads_out(key: str) -> bool:
    return key.startswith("/") or ".." in key.split("/")


def _sample(image: Member | None, text: Member | None, fault: Fault | None) -> npt.NDArray[np.void]:
    wanted = [member for member in (image, text) if member]
    start = min((member.header for member in wanted), default=0)
    too_large = max((member.stop for member in wanted), default=0) - start > MAX_SAMPLE_BYTES
    if fault or too_large:
        return np.array((start, 0, 0, 0, 0, FAULTS.index(fault or "too_large"), b""), SAMPLE)
    spans = [(member.start - start, member.stop - member.start) if member else (0, 0) for member in (image, text)]
    return np.array((start, *spans[0], *spans[1], 0, b""), SAMPLE)
