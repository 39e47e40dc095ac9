"""Encode a parameter as stored arrays and a manifest entry, and decode it again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tclip_jax.artifacts.manifest import FLOAT_CODING, TERNARY_CODING, UNIFORM_CODINGS, ArtifactError
from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.ternary import TernaryTensor, UniformTensor
from tclip_jax.ternary.packing import pack_base3, pack_fields, unpack_base3, unpack_fields
from tclip_jax.ternary.uniform import check_integers, largest_integer, pack_uniform

# Trits repeat only by chance, so level 1, which hardly searches for repetitions, gives the smallest files at 45–75 %
# zeros. In floats only the exponent bytes compress: scales shrink to 0.40 of their size, to 0.37 at level 19.
_ZSTD_LEVEL = 1

Stored = dict[str, npt.NDArray[Any]]


def encode(path: str, leaf: Any, rest_dtype: str) -> tuple[dict[str, Any], Stored]:
    """Return the entry of a parameter in tclip.json, and the arrays to store.

    Args:
      path: the parameter's path; the names of the arrays start with it.
      leaf: a `TernaryTensor`, a `UniformTensor` or a float array, lazy or not.
      rest_dtype: dtype in which a float array is stored. Scales are float16 if that is exact, else float32.

    Returns:
      The entry, and uint8 arrays (bytes,) by name.

    Raises:
      ArtifactError: a value is not finite after the cast, a scale is negative or too large for its integers, a trit is
        not −1, 0 or +1, or an integer is beyond its bits.
    """
    entry: dict[str, Any]
    if not isinstance(leaf, TernaryTensor | UniformTensor):
        value = _cast(path, np.asarray(leaf), rest_dtype)
        entry = {"coding": FLOAT_CODING, "shape": list(value.shape), "dtype": rest_dtype, "sha256": _digest(value)}
        return entry, {path: _compressed(_planes(value))}
    scale = np.asarray(leaf.scale, np.float32)
    half = _cast(f"{path}.scale", scale, "float16" if _exact_in_float16(scale) else "float32")
    bits = leaf.bits if isinstance(leaf, UniformTensor) else None
    coding = next((name for name, each in UNIFORM_CODINGS.items() if each == bits), TERNARY_CODING)
    _check_scale(path, half, coding)
    name = array_names(path, coding)[0]
    try:
        packed = _pack(np.asarray(leaf.integers), coding)
    except ValueError as error:
        raise ArtifactError(f"{name}: {error}") from None
    entry = {
        "coding": coding,
        "shape": list(leaf.shape),
        "dtype": half.dtype.name,
        "group": leaf.group,
        "axis": leaf.axis,
        "scale_shape": list(half.shape),
        "sha256": _digest(packed, half),
    }
    return entry, {name: _compressed(packed), f"{path}.scale": _compressed(_planes(half))}


def decode(path: str, entry: Mapping[str, Any], stored: Mapping[str, npt.NDArray[Any] | LazyArray]) -> Any:
    """Return the float32 array, `TernaryTensor` or `UniformTensor` at `path`, the inverse of `encode`.

    Args:
      path: the parameter's path.
      entry: its entry in tclip.json, already checked against the configuration.
      stored: all arrays of the file, by name.

    Raises:
      ArtifactError: the stored arrays do not match `entry`.
    """
    if entry["coding"] == FLOAT_CODING:
        value = _floats(path, stored[path], entry["shape"], entry["dtype"])
        _check_digest(path, entry, value)
        return value.astype(np.float32, copy=False)
    scale = _floats(f"{path}.scale", stored[f"{path}.scale"], entry["scale_shape"], entry["dtype"])
    _check_scale(path, scale, entry["coding"])
    coding, shape, name = entry["coding"], tuple(entry["shape"]), array_names(path, entry["coding"])[0]
    packed = _expanded(name, stored[name], packed_bytes(coding, shape))
    try:
        integers: Any = _unpack(packed, coding, shape)
    except ValueError as error:
        raise ArtifactError(f"{name}: {error}") from None
    _check_digest(path, entry, packed, scale)
    level: Any = scale.astype(np.float32)
    if coding == TERNARY_CODING:
        return TernaryTensor(integers, level, entry["group"], entry["axis"])
    return pack_uniform(integers, level, UNIFORM_CODINGS[coding], entry["group"], entry["axis"])


def array_names(path: str, coding: str) -> tuple[str, ...]:
    """Return the names of the arrays that hold a parameter: trits or integers first, then scales."""
    if coding == FLOAT_CODING:
        return (path,)
    return f"{path}.{'trits' if coding == TERNARY_CODING else 'integers'}", f"{path}.scale"


def packed_bytes(coding: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of the trits (five a byte) or integers of a tensor, before compression."""
    count = math.prod(shape)
    return -(-count // 5) if coding == TERNARY_CODING else -(-count * UNIFORM_CODINGS[coding] // 8)


def _check_scale(path: str, scale: npt.NDArray[Any], coding: str) -> None:
    """Raise ArtifactError for a scale that is negative, or whose largest multiple is not finite in float32."""
    if (scale < 0).any():
        raise ArtifactError(f"{path}.scale is negative: a scale is 0 or more")
    largest = 1 if coding == TERNARY_CODING else largest_integer(UNIFORM_CODINGS[coding])
    bound = np.finfo(np.float32).max / largest
    if (scale.astype(np.float64) > bound).any():
        raise ArtifactError(
            f"{path}.scale has {scale.max():g}: times the integer {largest} it must be finite, so at most {bound:g}"
        )


def _pack(integers: npt.NDArray[Any], coding: str) -> npt.NDArray[np.uint8]:
    """Pack trits or integers, in C order. Raises ValueError for a value beyond the coding's."""
    if coding == TERNARY_CODING:
        return pack_base3(integers)
    check_integers(integers, UNIFORM_CODINGS[coding])
    return pack_fields(integers.reshape(-1), UNIFORM_CODINGS[coding])


def _unpack(packed: npt.NDArray[np.uint8], coding: str, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """Undo `_pack`."""
    if coding == TERNARY_CODING:
        return unpack_base3(packed, shape)
    integers = unpack_fields(packed, UNIFORM_CODINGS[coding], math.prod(shape)).reshape(shape)
    check_integers(integers, UNIFORM_CODINGS[coding])
    return integers


def largest_stored_bytes(entry: Mapping[str, Any]) -> int:
    """Return an upper bound, in bytes, for the stored arrays of an entry and their names in the header."""
    coding = entry["coding"]
    size = math.prod(entry["shape" if coding == FLOAT_CODING else "scale_shape"]) * np.dtype(entry["dtype"]).itemsize
    size += 0 if coding == FLOAT_CODING else packed_bytes(coding, tuple(entry["shape"]))
    # On incompressible data zstd adds less than 1/128 plus a few bytes a frame; 1,024 bytes are for the names.
    return size + size // 128 + 2 * 512 + 1024


def _planes(value: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return byte planes, uint8 (itemsize, size): the first byte of every number, then the second, and so on."""
    return np.ascontiguousarray(value.reshape(-1).view(np.uint8).reshape(-1, value.dtype.itemsize).T)


def _floats(name: str, stored: npt.NDArray[Any] | LazyArray, shape: list[int], dtype: str) -> npt.NDArray[Any]:
    itemsize = np.dtype(dtype).itemsize
    planes = _expanded(name, stored, math.prod(shape) * itemsize).reshape(itemsize, -1)
    value = np.ascontiguousarray(planes.T).view(dtype).reshape(shape)
    if not np.isfinite(value).all():
        raise ArtifactError(f"{name} holds NaN or infinity: every number must be finite")
    return value


def _compressed(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data.data), np.uint8)


def _expanded(name: str, stored: npt.NDArray[Any] | LazyArray, size: int) -> npt.NDArray[np.uint8]:
    if stored.dtype != np.uint8 or len(stored.shape) != 1:
        raise ArtifactError(f"{name} is {stored.dtype.name} {list(stored.shape)}: it must be uint8 with one axis")
    frame = np.asarray(stored).data
    try:
        declared = zstandard.frame_content_size(frame)
        if declared == size:
            data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
            return np.frombuffer(data, np.uint8)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{name} is not one zstd frame: {error}") from None
    expanded = "an unknown number of" if declared < 0 else declared
    raise ArtifactError(f"{name} expands to {expanded} bytes: the frame must declare {size}, from the shape")


def _cast(name: str, value: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(value.astype(np.float32, copy=False).astype(dtype, copy=False)).reshape(value.shape)
    if not np.isfinite(cast).all():
        raise ArtifactError(f"{name} is not finite in {dtype}: NaN, infinity, or beyond {np.finfo(dtype).max:g}")
    return cast


def _exact_in_float16(scale: npt.NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool((scale.astype(np.float16) == scale).all())


def _check_digest(path: str, entry: Mapping[str, Any], *arrays: npt.NDArray[Any]) -> None:
    if _digest(*arrays) != entry.get("sha256"):
        raise ArtifactError(f"{path} is damaged: its decoded values do not have the sha256 in tclip.json")


def _digest(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
