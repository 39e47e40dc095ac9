"""Read and write safetensors files, local or remote, with one tensor in memory at a time.

The safetensors library cannot do this: it memory-maps the file, which must be local, and it writes only tensors that
are all in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.schema import plain


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array of known shape and dtype that is not in memory; every `np.asarray` of it calls `load`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], npt.NDArray[Any]]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.load(), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyStack:
    """Lazy arrays of equal shape and dtype, stacked on a new leading axis; `stack[i]` is the lazy array i."""

    layers: tuple[LazyArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.layers), *self.layers[0].shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.layers[0].dtype

    def __getitem__(self, index: int) -> LazyArray:
        return self.layers[index]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        # Fill in place: np.stack would hold every layer twice.
        stacked = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, layer in enumerate(self.layers):
            stacked[i] = layer.load()
        return stacked


# In ascending order of alignment. The library sorts tensors by dtype in descending order.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_NAMES = {dtype: (order, name) for order, (name, dtype) in enumerate(_DTYPES.items())}
_MAX_HEADER_BYTES = 100 * 2**20  # the library's own limit
_CHUNK = 16 * 2**20


def read_safetensors(path: epath.PathLike) -> dict[str, LazyArray]:
    """Check a file's header and size, and return its tensors by name, lazily.

    Raises:
      ValueError: the file is truncated or not a safetensors file.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or not a safetensors file: its {size} bytes do not hold a header")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, **fields) for name, fields in header.items()}
        end = 0
        # Reject overlaps: with them a small file could expand to much memory.
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if fields["data_offsets"][0] != end:
                start = fields["data_offsets"][0]
                raise ValueError(f"{plain(name)} starts at byte {start}: the previous tensor ends at {end}")
            end = fields["data_offsets"][1]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: bad header: {plain(error, 200)}") from None
    if size != 8 + length + end:
        raise ValueError(f"{path} is truncated or damaged: it has {size} bytes, its header states {8 + length + end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError if a key is duplicated."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is duplicated")
    return fields


def _tensor(path: epath.Path, data: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> LazyArray:
    kind = jnp.dtype(_DTYPES[dtype])
    start, end = data_offsets
    counts = all(type(number) is int and number >= 0 for number in (start, *shape))
    if not counts or end - start != math.prod(shape) * kind.itemsize:
        raise ValueError(f"bytes {start} to {end} cannot be {dtype} {shape}")
    return LazyArray(tuple(shape), kind, functools.partial(_read, path, data + start, tuple(shape), kind))


def _read(path: epath.Path, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with path.open("rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def write_safetensors(
    path: epath.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write arrays, lazy or not, one at a time; the bytes are those of safetensors.numpy.save.

    Args:
      path: the file, local or remote.
      tensors: arrays by name.
      metadata: the "__metadata__" of the header.

    Returns:
      The file's size as "bytes", and its "sha256" in hexadecimal.
    """
    names = sorted(sorted(tensors), key=lambda name: -_NAMES[tensors[name].dtype.name][0])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + math.prod(tensors[name].shape) * tensors[name].dtype.itemsize
        kind = _NAMES[tensors[name].dtype.name][1]
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with epath.Path(path).open("wb") as file:

        def put(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        put(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, _CHUNK):
                put(flat[start : start + _CHUNK].tobytes())
    return {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}
