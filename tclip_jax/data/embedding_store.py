"""A teacher's embeddings of a data set, computed once for several augmentations of each sample: the store.

The folder holds cache.json and files 00000.npy, 00001.npy, … of float16 (rows, 2, D): the embeddings of images and of
texts. Row copy · samples + index is of that sample with the caption and augmentation that `copy_generator` draws.
Beside each lies 00000.crc32 of little-endian uint32 (rows,): the CRC-32 of each row's bytes, compared when it is read.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax import keys
from tclip_jax.schema import from_mapping
from tclip_jax.storage import is_local, write_atomic

MANIFEST = "cache.json"

Embeddings = npt.NDArray[np.float16]


def copy_generator(seed: int, index: int, copy: int) -> np.random.Generator:
    """What draws the caption and the augmentation of one copy of a sample."""
    return np.random.default_rng((seed, index, copy))


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """What cache.json says, and the embeddings beside it.

    Attributes:
      folder: local, or gs:// and its like.
      teacher: where the teacher was loaded from.
      source: the data, as it was named.
      embed_dim: its D.
      logit_scale: exp of its parameter.
      samples: records of the source.
      copies: augmentations of each.
      seed: of all draws.
      file_rows: rows in every file but the last.
      made_by: what decides the embeddings, beside the seed: contents of the teacher and of the data, templates,
        augmentation, preprocessing, tokens.
    """

    folder: str
    teacher: str
    source: str
    embed_dim: int
    logit_scale: float
    samples: int
    copies: int
    seed: int
    file_rows: int
    made_by: dict[str, Any]

    @classmethod
    def open(cls, folder: epath.PathLike) -> TeacherCache:
        """Reads and checks cache.json, and that every file is there and of its size.

        Raises:
          FileNotFoundError: there is no cache, or a part of it is missing.
          ValueError: it is broken, or a file is cut short.
        """
        path = epath.Path(folder) / MANIFEST
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; expected a folder written by `tclip teacher-cache`")
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if isinstance(fields, dict) and "made_by" not in fields and "inputs" in fields:
            raise ValueError(
                f"{path}: an older version wrote it, which kept no content of its data: make it in a new folder"
            )
        cache = from_mapping(cls, {**fields, "folder": str(folder)} if isinstance(fields, dict) else fields, str(path))
        if min(cache.embed_dim, cache.samples, cache.copies, cache.file_rows) < 1:
            raise ValueError(f"{path}: embed_dim, samples, copies and file_rows must be at least 1")
        for file in range(cache.files):
            cache.check(file)
        return cache

    def check(self, file: int) -> None:
        """Raises FileNotFoundError for a file that is not there, ValueError for one that has another size."""
        shape, remedy = self._shape(file), "`tclip teacher-cache` again resumes where it stopped"
        whole = len(_header(shape)) + 2 * math.prod(shape)
        for path, kind, wanted in (
            (self.path(file), f"float16 {shape}", whole),
            (self._sums_path(file), f"uint32 {shape[:1]}", 4 * shape[0]),
        ):
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file; {remedy}")
            if (size := path.stat().length) != wanted:
                raise ValueError(f"{path}: {size:,} bytes: a whole file of {kind} has {wanted:,}; {remedy}")

    def write_manifest(self) -> None:
        """Writes cache.json, or finds it as it would write it.

        Raises:
          ValueError: the folder holds another cache.
        """
        path = epath.Path(self.folder) / MANIFEST
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        text = json.dumps(fields, indent=2) + "\n"
        if path.exists():
            was, now = json.loads(path.read_text()), json.loads(text)
            places = ("teacher", "source")  # may be others, if what lies there is the same
            if differs := keys.difference(*({k: v for k, v in each.items() if k not in places} for each in (was, now))):
                raise ValueError(f"{path}: this cache is another one ({differs}): choose another folder")
            return
        epath.Path(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)

    @property
    def origin(self) -> dict[str, Any]:
        """Of the teacher that a run learns from: where it was, and a digest of all that decides the embeddings."""
        made_by = {**self.made_by, "seed": self.seed, "copies": self.copies}
        return {"source": self.teacher, "content": keys.digest(made_by)}

    @property
    def files(self) -> int:
        """How many files of embeddings there are."""
        return -(-self.samples * self.copies // self.file_rows)

    def path(self, file: int) -> epath.Path:
        """Where a file of embeddings lies."""
        return epath.Path(self.folder) / f"{file:05}.npy"

    def rows_of(self, file: int) -> range:
        """The rows of the whole cache that a file holds."""
        return range(file * self.file_rows, min((file + 1) * self.file_rows, self.samples * self.copies))

    def write(self, file: int, embeddings: Embeddings) -> None:
        """Writes one file (rows, 2, D) and its checksums, whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings, allow_pickle=False)
        sums = np.array([zlib.crc32(row.tobytes()) for row in embeddings], "<u4")
        write_atomic(self._sums_path(file), sums.tobytes())
        write_atomic(self.path(file), buffer.getvalue())
        for kept in (_fetch, _check_header, _sums):
            kept.cache_clear()

    def read(self, index: int, copy: int) -> Embeddings:
        """The embeddings (2, D) of one copy of a sample: of its image and of its text.

        Raises:
          ValueError: the file is damaged, or has become another since the cache was opened.
        """
        file, row = divmod(copy * self.samples + index, self.file_rows)
        path, header = str(self.path(file)), _header(self._shape(file))
        size = 4 * self.embed_dim
        _check_header(path, header)
        data = _read(path, len(header) + row * size, size)
        if len(data) < size:
            raise ValueError(f"{path}: row {row} is not there: the file was cut short after it was opened")
        if zlib.crc32(data) != _sums(str(self._sums_path(file)))[row]:
            raise ValueError(f"{path}: row {row} is damaged: remove this file, and `tclip teacher-cache` makes it anew")
        return np.frombuffer(data, "<f2").reshape(2, self.embed_dim)

    def _sums_path(self, file: int) -> epath.Path:
        return epath.Path(self.folder) / f"{file:05}.crc32"

    def _shape(self, file: int) -> tuple[int, int, int]:
        return len(self.rows_of(file)), 2, self.embed_dim


@functools.cache
def _header(shape: tuple[int, ...]) -> bytes:
    """What np.save writes before the values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@functools.cache
def _check_header(path: str, header: bytes) -> None:
    if _read(path, 0, len(header)) != header:
        raise ValueError(f"{path}: not a whole file of embeddings: it does not begin as NumPy begins one of its shape")


@functools.lru_cache(maxsize=4096)
def _sums(path: str) -> npt.NDArray[np.uint32]:
    """The checksums of a file's rows."""
    return np.frombuffer(epath.Path(path).read_bytes(), "<u4")


def _read(path: str, start: int, size: int) -> bytes:
    # Not by a memory map: a file that is cut short while mapped ends the process by a signal.
    if not is_local(epath.Path(path)):
        return _fetch(path)[start : start + size]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=64)
def _fetch(path: str) -> bytes:
    """A whole file of an object store."""
    return epath.Path(path).read_bytes()
