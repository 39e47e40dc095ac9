"""Embed any number of images or texts resumably, and write the embeddings to a file."""

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

from tclip_jax.data.images import read_picture
from tclip_jax.inference.inputs import Failure, Item
from tclip_jax.inference.model import Embeddings, Model, fingerprint
from tclip_jax.keys import digest, recipe
from tclip_jax.pages import printable
from tclip_jax.storage import atomic_file, write_atomic

_CHUNK = 4096  # rows per array in `chunked`


class Store:
    """Embeddings by key in a folder. Every `add` writes one file atomically; unreadable files are ignored.

    Args:
      folder: the folder; created by the first `add`.
      width: width of the embeddings. Files with another width are ignored.
    """

    def __init__(self, folder: epath.PathLike, width: int) -> None:
        self._folder, self._width = epath.Path(folder), width
        self._locations: dict[str, tuple[int, int]] = {}
        self._next = 0
        names = [path.name for path in self._folder.iterdir()] if self._folder.exists() else []
        for number in sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d+\.npz", name)):
            self._next = number + 1
            try:
                keys, embeddings = self._read(number)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if embeddings.shape == (len(keys), width):
                self._locations |= {str(key): (number, row) for row, key in enumerate(keys)}
        # Consecutive keys are mostly in the same file.
        self._part = functools.lru_cache(maxsize=4)(self._read)

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    def add(self, keys: Sequence[str], embeddings: Embeddings) -> None:
        """Store the embeddings (N, width) of N keys."""
        buffer = io.BytesIO()
        np.savez(buffer, keys=np.array(keys, np.str_), embeddings=embeddings)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / f"{self._next:08d}.npz", buffer.getvalue())
        self._locations |= {key: (self._next, row) for row, key in enumerate(keys)}
        self._next += 1

    def row(self, key: str) -> Embeddings:
        """Return the embedding (width,) of an existing key."""
        number, row = self._locations[key]
        return self._part(number)[1][row]

    def remove(self) -> None:
        """Delete the folder."""
        self._folder.rmtree(missing_ok=True)

    def _read(self, number: int) -> tuple[npt.NDArray[np.str_], Embeddings]:
        with np.load(io.BytesIO((self._folder / f"{number:08d}.npz").read_bytes()), allow_pickle=False) as part:
            return part["keys"], part["embeddings"].astype(np.float32, copy=False)


def chunked(rows: Iterable[Embeddings], width: int) -> Iterator[Embeddings]:
    """Stack rows (width,) to arrays (n, width) with n up to 4,096."""
    chunk: list[Embeddings] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _CHUNK:
            yield np.stack(chunk)
            chunk = []
    if chunk:
        yield np.stack(chunk).reshape(-1, width)


_VERSION = 2  # increment when the encoding of an image or a text changes


def read_image(model: Model, path: epath.Path) -> npt.NDArray[np.float32]:
    """Read and preprocess an image file to normalised pixels (H, W, 3).

    Raises:
      ValueError: the file is unreadable, not a usable image, or larger than 256 MiB.
    """
    return model.preprocess(read_picture(path))[0]


def embeddings_mark(model: Model, path: epath.PathLike) -> str:
    """Return a digest of 32 hexadecimal digits of everything that determines embeddings: weights, activations, version.

    Args:
      model: the model.
      path: where the model was loaded from; see `fingerprint`.
    """
    return digest(recipe(weights=fingerprint(model, path), activations=model.activations, version=_VERSION))


def embed_images(model: Model, items: Sequence[Item], store: Store, batch_size: int = 64) -> list[Failure]:
    """Add every missing image to the store, and return the images that could not be read."""

    def encode(pixels: list[npt.NDArray[np.float32]]) -> Embeddings:
        return model.encode_image(np.stack(pixels), batch_size=batch_size)

    return _embed(items, store, lambda path: read_image(model, path), encode, batch_size, "image")


def embed_texts(model: Model, items: Sequence[Item], store: Store, batch_size: int = 64) -> list[Failure]:
    """Add every missing text to the store, and return the failures."""

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
    pending = list({item.key: item for item in items if item.key not in store}.values())
    size = min(batch_size, 1 << max(len(pending) - 1, 0).bit_length())
    bar = tqdm.tqdm(total=len(items), initial=len(items) - len(pending), unit=unit, disable=None)
    with bar, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(pending), size):
            batch = pending[start : start + size]
            prepared = list(pool.map(attempt, batch))
            usable = [(item.key, each) for item, each in zip(batch, prepared, strict=True) if type(each) is not Failure]
            failures += [each for each in prepared if type(each) is Failure]
            if usable:
                keys, contents = zip(*usable, strict=True)
                # Padding gives all batches one shape, so one program encodes them, with the same bits at any position.
                padded = [*contents, *contents[-1:] * (size - len(contents))]
                store.add(keys, encode(padded)[: len(keys)])
            bar.update(len(batch))
    return failures


def write_embeddings(out: epath.PathLike, items: Iterable[Item], store: Store, width: int) -> int:
    """Write the embeddings of all items in the store, in the order of the items, and return their number.

    `x.npy` has float32 (N, width), and `x.names.json` next to it a list of N names. `x.parquet` has the columns `name`
    and `embedding`. Rows are streamed and need not fit in memory.

    Raises:
      ValueError: `out` has another suffix.
    """
    out = checked_output(out)
    stored = [item for item in items if item.key in store]
    names = [printable(item.name) for item in stored]
    chunks = chunked((store.row(item.key) for item in stored), width)
    with atomic_file(out) as file:
        (_write_npy if out.suffix == ".npy" else _write_parquet)(file, names, chunks, width)
        if out.suffix == ".npy":
            # After all rows are written and before their file is renamed: if x.npy exists, its names do too.
            write_atomic(out.with_suffix(".names.json"), json.dumps(names, ensure_ascii=False, indent=0) + "\n")
    return len(stored)


def checked_output(out: epath.PathLike) -> epath.Path:
    """Return `out` as a path, and check its suffix.

    Raises:
      ValueError: the suffix is not .npy or .parquet.
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
    """Write the header of a .npy file of float32 (rows, width)."""
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
