"""A teacher's embeddings of a data set, computed once for several augmentations of each sample: the store.

The folder holds cache.json and files 00000.npy, 00001.npy, … of float16 (rows, 2, D): the embeddings of images and of
texts. Row copy · samples + index is of that sample with the caption and augmentation that `copy_generator` draws.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

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
      embed_dim: its D.
      logit_scale: exp of its parameter.
      samples: records of the source.
      copies: augmentations of each.
      seed: of all draws.
      file_rows: rows in every file but the last.
      inputs: all else that decides what the teacher saw: source, split, templates, augmentation, preprocessing, tokens.
    """

    folder: str
    teacher: str
    embed_dim: int
    logit_scale: float
    samples: int
    copies: int
    seed: int
    file_rows: int
    inputs: dict[str, Any]

    @classmethod
    def open(cls, folder: epath.PathLike) -> TeacherCache:
        """Reads and checks cache.json, and that every file is there.

        Raises:
          FileNotFoundError: there is no cache, or a part of it is missing.
          ValueError: it is broken.
        """
        path = epath.Path(folder) / MANIFEST
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; expected a folder written by `tclip teacher-cache`")
        try:
            fields = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        cache = from_mapping(cls, {**fields, "folder": str(folder)} if isinstance(fields, dict) else fields, str(path))
        if min(cache.embed_dim, cache.samples, cache.copies, cache.file_rows) < 1:
            raise ValueError(f"{path}: embed_dim, samples, copies and file_rows must be at least 1")
        missing = [cache.path(i) for i in range(cache.files) if not cache.path(i).exists()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file; `tclip teacher-cache` again goes on where it stopped")
        return cache

    def write_manifest(self) -> None:
        """Writes cache.json, or finds it as it would write it.

        Raises:
          ValueError: the folder holds another cache.
        """
        path = epath.Path(self.folder) / MANIFEST
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "folder"}
        text = json.dumps(fields, indent=2) + "\n"
        if path.exists():
            was = json.loads(path.read_text())
            for name, value in json.loads(text).items():
                if was.get(name) != value:
                    raise ValueError(
                        f"{path}: this cache has {name} {was.get(name)}, not {value}: choose another folder"
                    )
            return
        epath.Path(self.folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)

    @property
    def files(self) -> int:
        return -(-self.samples * self.copies // self.file_rows)

    def path(self, file: int) -> epath.Path:
        return epath.Path(self.folder) / f"{file:05}.npy"

    def rows_of(self, file: int) -> range:
        return range(file * self.file_rows, min((file + 1) * self.file_rows, self.samples * self.copies))

    def write(self, file: int, embeddings: Embeddings) -> None:
        """Writes one file (rows, 2, D), whole or not at all."""
        buffer = io.BytesIO()
        np.save(buffer, embeddings, allow_pickle=False)
        write_atomic(self.path(file), buffer.getvalue())

    def read(self, index: int, copy: int) -> Embeddings:
        """The embeddings (2, D) of one copy of a sample: of its image and of its text."""
        file, row = divmod(copy * self.samples + index, self.file_rows)
        return np.array(_open(str(self.path(file)), (len(self.rows_of(file)), 2, self.embed_dim))[row])


@functools.lru_cache(maxsize=1024)
def _open(path: str, shape: tuple[int, ...]) -> Embeddings:
    """A file by memory map, or whole from an object store."""
    try:
        given = path if is_local(epath.Path(path)) else io.BytesIO(epath.Path(path).read_bytes())
        array = np.load(given, mmap_mode="r" if isinstance(given, str) else None, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: not a whole file of embeddings: {error}") from None
    if array.shape != shape or array.dtype != np.float16:
        raise ValueError(f"{path}: it holds {array.dtype} {array.shape}: it must be float16 {shape}")
    return array
