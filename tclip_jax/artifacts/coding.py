"""One parameter to stored arrays and their description, and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from tclip_jax.artifacts.manifest import FLOAT_CODING, TERNARY_CODING, ArtifactError
from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.ternary import TernaryTensor
from tclip_jax.ternary.packing import pack_base3, unpack_base3

# Repetitions in trits are chance: level 1, which hardly looks for them, gives the smallest files at 45–75 % zeros. Of
# floats the bytes with the exponents are worth coding: 0.40 of the size of scales remains, 0.37 at level 19.
_ZSTD_LEVEL = 1

Stored = dict[str, npt.NDArray[Any]]


def encode(path: str, leaf: Any, rest_dtype: str) -> tuple[dict[str, Any], Stored]:
    """The description of a parameter in tclip.json, and the arrays that are stored for it.

    Scales become float16 where that is exact; other parameters become `rest_dtype`.

    Raises:
      ArtifactError: a value that is not finite after the cast, a negative scale, or something that is not a trit.
    """
    entry: dict[str, Any]
    if not isinstance(leaf, TernaryTensor):
        value = _cast(path, np.asarray(leaf), rest_dtype)
        entry = {"coding": FLOAT_CODING, "shape": list(value.shape), "dtype": rest_dtype, "sha256": _digest(value)}
        return entry, {path: _compressed(_planes(value))}
    scale = np.asarray(leaf.scale, np.float32)
    half = _cast(f"{path}.scale", scale, "float16" if _exact_in_float16(scale) else "float32")
    if (half < 0).any():
        raise ArtifactError(f"{path}.scale is negative: a scale is 0 or more")
    try:
        packed = pack_base3(np.asarray(leaf.trits))
    except ValueError as error:
        raise ArtifactError(f"{path}.trits: {error}") from None
    entry = {
        "coding": TERNARY_CODING,
        "shape": list(leaf.shape),
        "dtype": half.dtype.name,
        "group": leaf.group,
        "axis": leaf.axis,
        "scale_shape": list(half.shape),
        "sha256": _digest(packed, half),
    }
    return entry, {f"{path}.trits": _compressed(packed), f"{path}.scale": _compressed(_planes(half))}


def decode(path: str, entry: Mapping[str, Any], stored: Mapping[str, npt.NDArray[Any] | LazyArray]) -> Any:
    """The float32 array or `TernaryTensor` at `path`; `entry` must have been checked against the configuration.

    Raises:
      ArtifactError: arrays that are not what `entry` says.
    """
    if entry["coding"] == FLOAT_CODING:
        value = _floats(path, stored[path], entry["shape"], entry["dtype"])
        _check_digest(path, entry, value)
        return value.astype(np.float32, copy=False)
    scale = _floats(f"{path}.scale", stored[f"{path}.scale"], entry["scale_shape"], entry["dtype"])
    if (scale < 0).any():
        raise ArtifactError(f"{path}.scale is negative: a scale is 0 or more")
    shape = tuple(entry["shape"])
    packed = _expanded(f"{path}.trits", stored[f"{path}.trits"], packed_bytes(shape))
    try:
        trits: Any = unpack_base3(packed, shape)
    except ValueError as error:
        raise ArtifactError(f"{path}.trits: {error}") from None
    _check_digest(path, entry, packed, scale)
    level: Any = scale.astype(np.float32)
    return TernaryTensor(trits, level, entry["group"], entry["axis"])


def packed_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of the base-3 code of a tensor, before compression."""
    return -(-math.prod(shape) // 5)


def largest_stored_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes that the stored arrays of a described parameter and their names cannot exceed."""
    ternary = entry["coding"] == TERNARY_CODING
    size = math.prod(entry["scale_shape" if ternary else "shape"]) * np.dtype(entry["dtype"]).itemsize
    size += packed_bytes(tuple(entry["shape"])) if ternary else 0
    # What zstd may add to incompressible data is below 1/128 and some bytes for each frame; 1,024 are for the names.
    return size + size // 128 + 2 * 512 + 1024


def _planes(value: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """The first byte of every number, then the second, …: (itemsize, size)."""
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
    what = "an unknown number of" if declared < 0 else declared
    raise ArtifactError(f"{name} expands to {what} bytes: its shape has {size}, which the frame must declare")


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
        raise ArtifactError(f"{path} does not have the sha256 that tclip.json gives for its decoded values")


def _digest(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
