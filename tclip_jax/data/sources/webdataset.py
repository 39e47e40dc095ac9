"""Webdataset exports of CLIP_benchmark, tar files at random access: the form in which the evaluation data is shared."""

from __future__ import annotations

import functools
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

from tclip_jax.data.files import PassedOver, compression, is_hidden, read_lines, split_lines
from tclip_jax.data.sources.base import Record, decode_caption
from tclip_jax.data.sources.content import combined, contents
from tclip_jax.data.sources.tar import CLIP_BENCHMARK_ORDER, Member, image_of, members, pass_over_rest
from tclip_jax.pages import printable

Kind = Literal["classification", "multilabel", "retrieval"]

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
DATASET_TYPE, SHARD_COUNT = "dataset_type.txt", "nshards.txt"

_TARGET_SUFFIXES: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_MAX_TEXT = 1 << 24  # bytes of a text file beside the shards; the largest list of class names has 20 kB


class _Sample(NamedTuple):
    shard: int
    key: str
    image: Member | None
    target: Member | None


class Webdataset:
    """`<folder>/<split>/{nshards.txt,0.tar,1.tar,…}`, with what is in `<folder>` beside them.

    A sample is a run of members with one key: an image with a `.cls` (a class), an `.npy` (a 0/1 vector over the
    classes) or a `.txt` (captions, one per line), as `dataset_type.txt` says: absent, `multilabel`, `retrieval`. Class
    names are the lines of `classnames.txt`; one may be empty. The tar headers are read once; records are read when
    asked for. A sample without an image has no bytes, one without a whole target has label −1 or no captions.

    Attributes:
      kind: classification, multilabel or retrieval.
      classnames: of the labels; empty for captions.

    Raises:
      FileNotFoundError: no such folder, or a file is missing.
      ValueError: a shard that is no whole tar file, or a text file that cannot be right; one line naming it.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        self._folder = epath.Path(argument).expanduser()
        self._split = split
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(
                f"{self._folder}: a file, where an export of CLIP_benchmark, a folder, or tars are expected"
            )
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder}: no such folder; it holds a webdataset export of CLIP_benchmark")
        if not (self._folder / split).is_dir() and any(path.name.endswith(".tar") for path in self._folder.iterdir()):
            raise ValueError(f"{self._folder}: a folder of tars, and no export: write wds:{self._folder}/*.tar")
        count_file = self._folder / split / SHARD_COUNT
        count = " ".join(_read_lines(count_file)).strip()
        if not re.fullmatch(r"[1-9]\d{0,5}", count):
            raise ValueError(f"{count_file}: {count[:40]!r} is not a number of shards")
        type_file = self._folder / DATASET_TYPE
        kind = " ".join(_read_lines(type_file)).strip().lower() if type_file.exists() else "classification"
        if kind not in _TARGET_SUFFIXES:
            raise ValueError(f"{type_file}: {kind[:40]!r} is not one of {', '.join(_TARGET_SUFFIXES)}")
        self.kind: Kind = kind
        self.classnames = () if self.kind == "retrieval" else self._lines(CLASSNAMES)
        self._count, passed = int(count), PassedOver()
        self._samples = [sample for shard in range(self._count) for sample in self._index(shard, passed)]
        shards = {f"{shard}.tar" for shard in range(self._count)}
        for path in sorted((self._folder / split).iterdir()):
            if path.name not in (*shards, SHARD_COUNT) and not is_hidden(path.name):
                passed.add(path.name, f"of more shards than {SHARD_COUNT} says" if path.suffix == ".tar" else "")
        self.notes = [f"{self._folder}/{split}: {passed}"] if passed.kinds else []
        if "" in self.classnames:
            self.notes.append(f"{self._folder / CLASSNAMES}: line {self.classnames.index('') + 1} names no class")

    @property
    def templates(self) -> tuple[str, ...]:
        """The captions of a class, with `{c}` for its name: the lines of zeroshot_classification_templates.txt."""
        return self._lines(TEMPLATES)

    @functools.cached_property
    def digest(self) -> str:
        """Of the contents of the tars and the templates, and the kind and names of the classes."""
        files = [*map(self._shard, range(self._count)), self._folder / TEMPLATES]
        return combined([self.kind, *self.classnames, *contents(map(str, files), total=len(files))])

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Record:
        shard, key, image, target = self._samples[index]
        wanted = [member for member in (image, target) if member]
        start = min((member.start for member in wanted), default=0)
        # The members of a sample lie side by side: one read fetches them, which counts on object stores.
        with self._shard(shard).open("rb") as file:
            file.seek(start)
            data = file.read(max((member.stop for member in wanted), default=0) - start)
        pixels, found = (data[m.start - start : m.stop - start] if m else b"" for m in (image, target))
        name = printable(f"{self._folder.name}/{self._split}/{shard}.tar/{key}")
        if self.kind == "retrieval":
            return Record(pixels, tuple(split_lines(decode_caption(found, name))), -1, name)
        label = _multi_hot(found, len(self.classnames)) if self.kind == "multilabel" else _integer(found)
        return Record(pixels, (), label, name)

    def _shard(self, number: int) -> epath.Path:
        return self._folder / self._split / f"{number}.tar"

    def _lines(self, name: str) -> tuple[str, ...]:
        return tuple(_read_lines(self._folder / name))

    def _index(self, shard: int, passed: PassedOver) -> Iterator[_Sample]:
        path = self._shard(shard)
        for key, group in itertools.groupby(_members(path, passed), lambda member: member.key):
            files: dict[str, Member] = {}
            for member in group:
                if member.suffix in files:
                    raise ValueError(f"{path}: {key}.{member.suffix} is there twice")
                files[member.suffix] = member
            image, target = image_of(files, CLIP_BENCHMARK_ORDER), files.get(_TARGET_SUFFIXES[self.kind])
            pass_over_rest(files, (image, target), passed)
            yield _Sample(shard, key, image, target)


def _members(path: epath.Path, passed: PassedOver) -> Iterator[Member]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, which {SHARD_COUNT} beside it counts")
    with path.open("rb") as file:
        try:
            yield from members(file, passed)
        except tarfile.TarError as error:
            file.seek(0)
            if packed := compression(file.read(8)):
                raise ValueError(f"{path}: compressed with {packed}") from None
            raise ValueError(f"{path}: not a whole tar file: {error}") from None


def _read_lines(path: epath.Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, which a webdataset export of CLIP_benchmark has")
    return read_lines(path, _MAX_TEXT)


def _integer(text: bytes) -> int:
    return int(text) if re.fullmatch(rb"\s*\d{1,9}\s*", text) else -1


def _multi_hot(data: bytes, classes: int) -> np.ndarray:
    """The vector (classes,) int32 in an .npy file; −1 everywhere if there is none of 0 and 1 of that length."""
    nothing = np.full(classes, -1, np.int32)
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return nothing
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (classes,) or dtype.kind not in "biuf":
            return nothing
        vector = np.frombuffer(data, dtype, classes, file.tell())
    except Exception:  # from a broken header also a TokenError, a MemoryError and more
        return nothing
    return vector.astype(np.int32) if np.isin(vector, (0, 1)).all() else nothing
