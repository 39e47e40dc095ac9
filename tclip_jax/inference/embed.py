"""Embeddings of any number of images or texts, in parts that survive a kill, and the files they are kept in."""

from __future__ import annotations

import concurrent.futures
import functools
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import tqdm
from etils import epath

from tclip_jax.data.images import decode, normalize, preprocess
from tclip_jax.data.sources.remote import read_file
from tclip_jax.inference.inputs import Failure, Item
from tclip_jax.inference.model import Embeddings, Model, fingerprint
from tclip_jax.keys import digest, recipe
from tclip_jax.pages import printable
from tclip_jax.storage import atomic_file, write_atomic

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


_VERSION = 1  # raised where the same model makes other embeddings of the same image or text


def read_image(model: Model, path: epath.Path) -> npt.NDArray[np.float32]:
    """The normalised pixels (H, W, 3) that the model takes, of an image file.

    Raises:
      ValueError: a file that cannot be read, is no usable image, or is larger than 256 MiB.
    """
    p = model.preprocess
    return normalize(preprocess(decode(read_file(os.fspath(path))), p), p.mean, p.std)


def embeddings_mark(model: Model, path: epath.PathLike) -> str:
    """32 hexadecimal digits of all that decides the embedding of an image or a text: weights, activations, our code.

    Args:
      path: where the model was loaded from, as of `fingerprint`.
    """
    return digest(recipe(weights=fingerprint(model, path), activations=model.activations, version=_VERSION))


def embed_images(model: Model, items: Sequence[Item], store: Store, batch_size: int = 64) -> list[Failure]:
    """Adds to the store every image that is not in it; what cannot be read is returned with the reason."""

    def encode(pixels: list[npt.NDArray[np.float32]]) -> Embeddings:
        return model.encode_image(np.stack(pixels), batch_size=batch_size)

    return _embed(items, store, lambda path: read_image(model, path), encode, batch_size, "image")


def embed_texts(model: Model, items: Sequence[Item], store: Store, batch_size: int = 64) -> list[Failure]:
    """Adds to the store every text that is not in it."""

    def encode(texts: list[str]) -> Embeddings:
        return model.encode_text(texts, batch_size=batch_size)

    return _embed(items, store, lambda text: text, encode, batch_size, "text")


def _embed(
    items: Sequence[Item],
    store: Store,
    prepare: Callable[[Any], Any],
    encode: Callable[[list[Any]], Embeddings],
    batch_size: int,
    unit: str,
) -> list[Failure]:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be 1 or more")

    def attempt(item: Item) -> Any:
        try:
            return prepare(item.content)
        except (OSError, ValueError) as error:
            return Failure.of(item.name, error)

    failures: list[Failure] = []
    todo = list({item.key: item for item in items if item.key not in store}.values())
    size = min(batch_size, 1 << max(len(todo) - 1, 0).bit_length())
    bar = tqdm.tqdm(total=len(items), initial=len(items) - len(todo), unit=unit, disable=None)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            prepared = list(pool.map(attempt, batch))
            usable = [(item.key, each) for item, each in zip(batch, prepared, strict=True) if type(each) is not Failure]
            failures += [each for each in prepared if type(each) is Failure]
            if usable:
                keys, contents = zip(*usable, strict=True)
                # Filled up, all batches have one shape: it is compiled once, and gives the same bits wherever a row is.
                filled = [*contents, *contents[-1:] * (size - len(contents))]
                store.add(keys, encode(filled)[: len(keys)])
            bar.update(len(batch))
    return failures


def write_embeddings(out: epath.PathLike, items: Iterable[Item], store: Store, width: int) -> int:
    """Writes the embeddings of all items that the store has, in their order, and returns their number.

    `x.npy` holds float32 (N, width), and `x.names.json` beside it a list of N names; `x.parquet` the columns `name` and
    `embedding`. Rows are streamed: they need not fit in memory.

    Raises:
      ValueError: another suffix.
    """
    out = checked_output(out)
    kept = [item for item in items if item.key in store]
    names = [printable(item.name) for item in kept]
    chunks = chunked((store.row(item.key) for item in kept), width)
    with atomic_file(out) as file:
        (_write_npy if out.suffix == ".npy" else _write_parquet)(file, names, chunks, width)
        if out.suffix == ".npy":
            # When all rows are written, and before they get their name: with them, the output is complete.
            write_atomic(out.with_suffix(".names.json"), json.dumps(names, ensure_ascii=False, indent=0) + "\n")
    return len(kept)


def checked_output(out: epath.PathLike) -> epath.Path:
    """`out` as a path, if its suffix is one of those that can be written.

    Raises:
      ValueError: it is not.
    """
    out = epath.Path(out)
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{out}: embeddings are written as .npy or .parquet")
    return out


def _write_npy(file: IO[bytes], names: list[str], chunks: Iterable[Embeddings], width: int) -> None:
    write_npy_header(file, len(names), width)
    for chunk in chunks:
        file.write(chunk.astype("<f4", copy=False).tobytes())


def write_npy_header(file: IO[bytes], rows: int, width: int) -> None:
    """What precedes the bytes of float32 (rows, width) in a .npy file."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_parquet(file: IO[bytes], names: list[str], chunks: Iterable[Embeddings], width: int) -> None:
    kind = pyarrow.list_(pyarrow.float32(), width)
    schema = pyarrow.schema([("name", pyarrow.string()), ("embedding", kind)])
    start = 0
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for chunk in chunks:
            rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(chunk.reshape(-1)), width)
            part = pyarrow.array(names[start : start + len(chunk)], pyarrow.string())
            writer.write_table(pyarrow.table([part, rows.cast(kind)], schema=schema))
            start += len(chunk)
