"""safetensors files of any size, local or not, read lazily: one tensor in memory at a time.

The safetensors library maps the file, which must be local and counts as memory, and writes only what is all in memory.
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
    """An array of known shape and dtype; each `np.asarray` of it calls `load` again."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], npt.NDArray[Any]]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.load(), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class LazyStack:
    """Arrays of one shape and dtype along a new leading axis; `stack[i]` is one of them, still unread."""

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
        # Filled in place: np.stack would hold every layer twice.
        stacked = np.empty(self.shape, self.dtype if dtype is None else dtype)
        for i, layer in enumerate(self.layers):
            stacked[i] = layer.load()
        return stacked


# In the order in which the library sorts tensors, the last first.
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
    """The tensors of a file, unread; its header and size are checked.

    Raises:
      ValueError: a file that is truncated or no safetensors file, naming it.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: its {size} bytes do not hold a header")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, **fields) for name, fields in header.items()}
        end = 0
        # Overlapping tensors would let a small file ask for much memory.
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if fields["data_offsets"][0] != end:
                start = fields["data_offsets"][0]
                raise ValueError(f"{plain(name)} begins at byte {start}: the one before ends at {end}")
            end = fields["data_offsets"][1]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: bad header: {plain(error, 200)}") from None
    if size != 8 + length + end:
        raise ValueError(f"{path} is truncated or damaged: it has {size} bytes, its header gives {8 + length + end}")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose names comes twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
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
    """Writes arrays, lazy ones too, to the same bytes as safetensors.numpy.save; each is read once, in its turn.

    Returns:
      The "bytes" and "sha256" of the file.
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
