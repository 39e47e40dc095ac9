"""A cache of a teacher's embeddings of a data set, for several augmentations of each sample.

The folder contains cache.json and the files 00000.npy, 00001.npy, …: float16 (rows, 2, D), the embeddings of images and
of texts. Row copy · samples + index belongs to sample `index` with the caption and augmentation that `copy_generator`
draws. Each file has a file of checksums, such as 00000.crc32: little-endian uint32 (rows,), the CRC-32 of each row's
bytes. `TeacherCache.read` compares them.
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
from tclip_jax.storage import write_atomic

MANIFEST = "cache.json"

Embeddings = npt.NDArray[np.float16]


def copy_generator(seed: int, index: int, copy: int) -> np.random.Generator:
    """Return the generator that draws the caption and the augmentation of one copy of a sample."""
    return np.random.default_rng((seed, index, copy))


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    """A cache folder: the fields of cache.json, and access to the embeddings.

    Attributes:
      folder: a local path or a URL such as gs://….
      teacher: the path or name from which the teacher was loaded.
      source: the specification of the data source.
      embed_dim: D, the size of an embedding.
      logit_scale: the teacher's scale of the logits, the exponential of its parameter.
      samples: number of records in the source.
      copies: number of augmentations of each record.
      seed: seed of all draws.
      file_rows: rows in every file except the last.
      made_by: what the embeddings depend on, besides the seed: contents of the teacher and of the data, templates,
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
        """Read cache.json and check that every file exists and has the right size.

        Raises:
          FileNotFoundError: cache.json or another file is missing.
          ValueError: cache.json is invalid, or a file has another size.
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
                f"{path}: an older version wrote it, without the content of its data: make the cache in a new folder"
            )
        cache = from_mapping(cls, {**fields, "folder": str(folder)} if isinstance(fields, dict) else fields, str(path))
        if min(cache.embed_dim, cache.samples, cache.copies, cache.file_rows) < 1:
            raise ValueError(f"{path}: embed_dim, samples, copies and file_rows must be at least 1")
        for file in range(cache.files):
            cache.check(file)
        return cache

    def check(self, file: int) -> None:
        """Check that a file of embeddings and its checksums exist and have the right size.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: a file has another size.
        """
        shape, remedy = self._shape(file), "run `tclip teacher-cache` again, which resumes"
        length = len(_header(shape)) + 2 * math.prod(shape)
        for path, kind, expected in (
            (self.path(file), f"float16 {shape}", length),
            (self._sums_path(file), f"uint32 {shape[:1]}", 4 * shape[0]),
        ):
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file; {remedy}")
            if (size := path.stat().length) != expected:
                raise ValueError(f"{path}: {size:,} bytes: a complete file of {kind} has {expected:,}; {remedy}")

    def write_manifest(self) -> None:
        """Write cache.json, or check that an existing one is equal.

        Raises:
          ValueError: the folder contains another cache.
        """
        path = epath.Path(self.folder) / MANIFEST
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        text = json.dumps(fields, indent=2) + "\n"
        if path.exists():
            manifests = json.loads(path.read_text()), json.loads(text)
            paths = ("teacher", "source")  # these may differ; `made_by` has the digests of their contents
            if differs := keys.difference(*({k: v for k, v in each.items() if k not in paths} for each in manifests)):
                raise ValueError(f"{path}: the folder contains another cache ({differs}): choose another folder")
            return
        epath.Path(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)

    @property
    def origin(self) -> dict[str, Any]:
        """The teacher's source, and a digest of everything that the embeddings depend on; for the record of a run."""
        made_by = {**self.made_by, "seed": self.seed, "copies": self.copies}
        return {"source": self.teacher, "content": keys.digest(made_by)}

    @property
    def files(self) -> int:
        """Number of files of embeddings."""
        return -(-self.samples * self.copies // self.file_rows)

    def path(self, file: int) -> epath.Path:
        """Return the path of a file of embeddings."""
        return epath.Path(self.folder) / f"{file:05}.npy"

    def rows_of(self, file: int) -> range:
        """Return the rows of the cache that a file contains."""
        return range(file * self.file_rows, min((file + 1) * self.file_rows, self.samples * self.copies))

    def write(self, file: int, embeddings: Embeddings) -> None:
        """Write a file of embeddings (rows, 2, D) and its checksums, each atomically."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings, allow_pickle=False)
        sums = np.array([zlib.crc32(row.tobytes()) for row in embeddings], "<u4")
        write_atomic(self._sums_path(file), sums.tobytes())
        write_atomic(self.path(file), buffer.getvalue())
        for cached in (_fetch, _check_header, _sums):
            cached.cache_clear()

    def read(self, index: int, copy: int) -> Embeddings:
        """Return the embeddings (2, D) of the image and the text of one copy of a sample.

        Raises:
          ValueError: the file is damaged, or was changed after the cache was opened.
        """
        file, row = divmod(copy * self.samples + index, self.file_rows)
        # For each sample of a run; making epath.Path objects takes longer than reading the row.
        name = os.path.join(self.folder, f"{file:05}")
        path, header, size = f"{name}.npy", _header(self._shape(file)), 4 * self.embed_dim
        _check_header(path, header)
        data = _read(path, len(header) + row * size, size)
        if len(data) < size:
            raise ValueError(f"{path}: row {row} is missing: the file was truncated after it was opened")
        if zlib.crc32(data) != _sums(f"{name}.crc32")[row]:
            remedy = "remove this file and run `tclip teacher-cache`, which makes it again"
            raise ValueError(f"{path}: row {row} is damaged: {remedy}")
        return np.frombuffer(data, "<f2").reshape(2, self.embed_dim)

    def _sums_path(self, file: int) -> epath.Path:
        return epath.Path(self.folder) / f"{file:05}.crc32"

    def _shape(self, file: int) -> tuple[int, int, int]:
        return len(self.rows_of(file)), 2, self.embed_dim


@functools.cache
def _header(shape: tuple[int, ...]) -> bytes:
    """Return the bytes that np.save writes before the values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@functools.cache
def _check_header(path: str, header: bytes) -> None:
    if _read(path, 0, len(header)) != header:
        raise ValueError(f"{path}: not a file of embeddings of the expected shape: the NumPy header differs")


@functools.lru_cache(maxsize=4096)
def _sums(path: str) -> npt.NDArray[np.uint32]:
    """Return the checksums of a file's rows."""
    return np.frombuffer(epath.Path(path).read_bytes(), "<u4")


def _read(path: str, start: int, size: int) -> bytes:
    # Not with a memory map: if a mapped file is truncated, a signal ends the process.
    if "://" in path:
        return _fetch(path)[start : start + size]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, start)
    finally:
        os.close(descriptor)


@functools.lru_cache(maxsize=64)
def _fetch(path: str) -> bytes:
    """Read a file from an object store."""
    return epath.Path(path).read_bytes()
