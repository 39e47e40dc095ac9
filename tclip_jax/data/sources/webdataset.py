"""The sources of `wds:`: tars of images and captions, and the exports of CLIP_benchmark, the usual evaluation data."""

from __future__ import annotations

import functools
import glob
import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

from tclip_jax.data.files import SkippedFiles, compression, is_hidden, read_lines, split_lines
from tclip_jax.data.sources.base import Record, Source, decode_caption
from tclip_jax.data.sources.content import combined, contents
from tclip_jax.data.sources.patterns import find_files
from tclip_jax.data.sources.remote import retry
from tclip_jax.data.sources.shard_index import open_index
from tclip_jax.data.sources.tars import Member, Tars, members, scan, select_image, skip_unused
from tclip_jax.pages import printable

Kind = Literal["classification", "multilabel", "retrieval"]

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
DATASET_TYPE, SHARD_COUNT = "dataset_type.txt", "nshards.txt"

# If a sample has several images, exports of CLIP_benchmark use the first of these suffixes.
_IMAGE_ORDER = ("webp", "png", "jpg", "jpeg")
_TARGET_SUFFIXES: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_MAX_TEXT = 1 << 24  # bytes of a text file of an export; the largest list of class names has 20 kB
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|txz|tbz2?|tzst|zip|7z)$", re.IGNORECASE)


def open_webdataset(argument: str, split: str) -> Source:
    """Open the tars of a pattern (braces, globs, `::`, paths or URLs), a split of an export, or all tars of a folder.

    A folder is an export if it has one of an export's text files. Otherwise its tars, or those of its folder `split`,
    are read as img2dataset writes them.

    Raises:
      FileNotFoundError: a tar or the folder does not exist.
      ValueError: no tar can be read, a tar is compressed, or the folder is neither an export nor of tars.
    """
    if _TAR.search(argument) or glob.has_magic(argument) or "{" in argument:
        return Tars(open_index("tar", find_files(argument), scan))
    folder = epath.Path(argument).expanduser()
    text_files = (CLASSNAMES, TEMPLATES, DATASET_TYPE, f"{split}/{SHARD_COUNT}")
    if not any((folder / name).exists() for name in text_files):
        for tars in (folder / split, folder):
            if tars.is_dir() and any(path.name.endswith(".tar") for path in tars.iterdir()):
                return Tars(open_index("tar", find_files(f"{glob.escape(str(tars))}/*.tar"), scan))
    return Webdataset(argument, split)


class _Sample(NamedTuple):
    shard: int
    key: str
    image: Member | None
    target: Member | None


class Webdataset:
    """An export of CLIP_benchmark: `<folder>/<split>/{nshards.txt,0.tar,1.tar,…}` and text files in `<folder>`.

    A sample is a run of members with one key: an image and its target. `dataset_type.txt` selects the target: `.cls`, a
    class, if the file does not exist; `.npy`, a 0/1 vector over the classes, for `multilabel`; `.txt`, one caption per
    line, for `retrieval`. The lines of `classnames.txt` are the class names; a line may be blank. The tar headers are
    read once, and records when they are used. A sample without an image has empty bytes. A sample without a valid
    target has label −1, or no captions.

    Attributes:
      kind: classification, multilabel or retrieval.
      classnames: the class names; empty for retrieval.

    Raises:
      FileNotFoundError: the folder or a file does not exist.
      ValueError: a shard is not a complete tar file, or a text file is invalid. The message is one line and names the
        file.
    """

    classnames: tuple[str, ...]

    def __init__(self, argument: str, split: str) -> None:
        self._folder = epath.Path(argument).expanduser()
        self._split = split
        if self._folder.exists() and not self._folder.is_dir():
            raise ValueError(f"{self._folder}: a file; expected tars, or the folder of an export of CLIP_benchmark")
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder}: no such folder; expected tars, or a folder of tars")
        if not (self._folder / split).is_dir() and (splits := self._splits()):
            raise FileNotFoundError(f"{self._folder}: no split {split!r}; it has {', '.join(splits)}")
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
        self._count, skipped = int(count), SkippedFiles()
        self._samples = [sample for shard in range(self._count) for sample in self._index(shard, skipped)]
        shards = {f"{shard}.tar" for shard in range(self._count)}
        for path in sorted((self._folder / split).iterdir()):
            if path.name not in (*shards, SHARD_COUNT) and not is_hidden(path.name):
                skipped.add(path.name, f"shard not counted in {SHARD_COUNT}" if path.suffix == ".tar" else "")
        self.notes = [f"{self._folder}/{split}: {skipped}"] if skipped.kinds else []
        if "" in self.classnames:
            line = self.classnames.index("") + 1
            self.notes.append(f"{self._folder / CLASSNAMES}: line {line} is blank, so its class has no name")

    @property
    def templates(self) -> tuple[str, ...]:
        """The caption templates, with `{c}` for the class name: the lines of zeroshot_classification_templates.txt."""
        return self._lines(TEMPLATES)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the contents of the tars and the templates, the kind, and the class names."""
        files = [*map(self._shard, range(self._count)), self._folder / TEMPLATES]
        return combined([self.kind, *self.classnames, *contents(map(str, files), total=len(files))])

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Record:
        shard, key, image, target = self._samples[index]
        files = [member for member in (image, target) if member]
        start = min((member.start for member in files), default=0)
        name = printable(f"{self._folder.name}/{self._split}/{shard}.tar/{key}")

        def read() -> bytes:
            # The members of a sample are adjacent: one read fetches them, which matters on object stores.
            with self._shard(shard).open("rb") as file:
                file.seek(start)
                return file.read(max((member.stop for member in files), default=0) - start)

        data = retry(read, name, OSError)
        pixels, label = (data[m.start - start : m.stop - start] if m else b"" for m in (image, target))
        if self.kind == "retrieval":
            return Record(pixels, tuple(split_lines(decode_caption(label, name))), -1, name)
        if self.kind == "multilabel":
            return Record(pixels, (), _multi_hot(label, len(self.classnames)), name)
        return Record(pixels, (), _class_index(label), name)

    def _splits(self) -> list[str]:
        return sorted(path.parent.name for path in self._folder.glob(f"*/{SHARD_COUNT}"))

    def _shard(self, number: int) -> epath.Path:
        return self._folder / self._split / f"{number}.tar"

    def _lines(self, name: str) -> tuple[str, ...]:
        return tuple(_read_lines(self._folder / name))

    def _index(self, shard: int, skipped: SkippedFiles) -> Iterator[_Sample]:
        path = self._shard(shard)
        for key, run in itertools.groupby(_members(path, skipped), lambda member: member.key):
            files: dict[str, Member] = {}
            for member in run:
                if member.suffix in files:
                    raise ValueError(f"{path}: {key}.{member.suffix} occurs twice")
                files[member.suffix] = member
            image, target = select_image(files, _IMAGE_ORDER), files.get(_TARGET_SUFFIXES[self.kind])
            skip_unused(files, (image, target), skipped)
            yield _Sample(shard, key, image, target)


def _members(path: epath.Path, skipped: SkippedFiles) -> Iterator[Member]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, although {SHARD_COUNT} counts it")
    with path.open("rb") as file:
        try:
            yield from members(file, skipped)
        except tarfile.TarError as error:
            file.seek(0)
            if name := compression(file.read(8)):
                raise ValueError(f"{path}: compressed with {name}") from None
            raise ValueError(f"{path}: not a complete tar file: {error}") from None


def _read_lines(path: epath.Path) -> list[str]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a webdataset export of CLIP_benchmark has one")
    return read_lines(path, _MAX_TEXT)


def _class_index(text: bytes) -> int:
    return int(text) if re.fullmatch(rb"\s*\d{1,9}\s*", text) else -1


def _multi_hot(data: bytes, classes: int) -> np.ndarray:
    """Return the vector (classes,) int32 of an .npy file; −1 everywhere unless it has this shape and only 0 and 1."""
    invalid = np.full(classes, -1, np.int32)
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return invalid
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if shape != (classes,) or dtype.kind not in "biuf":
            return invalid
        vector = np.frombuffer(data, dtype, classes, file.tell())
    except Exception:  # a damaged header raises many types, such as TokenError and MemoryError
        return invalid
    return vector.astype(np.int32) if np.isin(vector, (0, 1)).all() else invalid
