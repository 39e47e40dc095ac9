"""Embeddings in a folder of parts: what a killed process had done is still there."""

from __future__ import annotations

import functools
import io
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.model import Embeddings
from tclip_jax.storage import write_atomic

_CHUNK = 4096  # rows that are handed on together


class Store:
    """Embeddings by key. Every `add` is one file, written whole; a file that cannot be read counts as absent."""

    def __init__(self, folder: epath.PathLike, width: int) -> None:
        self._folder, self._width = epath.Path(folder), width
        self._where: dict[str, tuple[int, int]] = {}
        self._next = 0
        names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
        for number in sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d+\.npz", name)):
            self._next = number + 1
            try:
                keys, embeddings = self._read(number)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if embeddings.shape == (len(keys), width):
                self._where |= {str(key): (number, row) for row, key in enumerate(keys)}
        # Neighbouring keys were mostly added together.
        self._part = functools.lru_cache(maxsize=4)(self._read)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def add(self, keys: Sequence[str], embeddings: Embeddings) -> None:
        """Keeps a row (N, width) for each key."""
        buffer = io.BytesIO()
        np.savez(buffer, keys=np.array(keys, np.str_), embeddings=embeddings)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"{self._next:08d}.npz", buffer.getvalue())
        self._where |= {key: (self._next, row) for row, key in enumerate(keys)}
        self._next += 1

    def row(self, key: str) -> Embeddings:
        """The embedding of a key that is there (width,)."""
        number, row = self._where[key]
        return self._part(number)[1][row]

    def remove(self) -> None:
        """Deletes the folder."""
        self._folder.rmtree(missing_ok=True)

    def _read(self, number: int) -> tuple[npt.NDArray[np.str_], Embeddings]:
        with np.load(io.BytesIO((self._folder / f"{number:08d}.npz").read_bytes()), allow_pickle=False) as part:
            return part["keys"], part["embeddings"].astype(np.float32, copy=False)


def chunked(rows: Iterable[Embeddings], width: int) -> Iterator[Embeddings]:
    """Rows (width,) gathered to arrays of at most some thousand."""
    chunk: list[Embeddings] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk).reshape(-1, width)
