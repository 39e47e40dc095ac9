"""Trits in bytes, for disk and memory, and an embedding table packed by rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3).astype(np.int8) - 1  # byte -> its five trits


def pack_base3(trits: np.ndarray) -> np.ndarray:
    """Five trits a byte: Σ (t_i + 1) · 3^i, i = 0…4, in C order; the last byte is filled with zero trits.

    Args:
      trits: integers −1, 0, +1, any shape.

    Returns:
      uint8 of ceil(size / 5) bytes, each at most 242.

    Raises:
      ValueError: a value that is not a trit.
    """
    flat = checked_trits(trits).reshape(-1)
    padded = np.zeros(-(-flat.size // 5) * 5, np.int8)
    padded[: flat.size] = flat
    return (padded.reshape(-1, 5) + 1).astype(np.uint8) @ _POWERS


def unpack_base3(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 trits of `pack_base3`, in `shape`.

    Raises:
      ValueError: a number of bytes that does not fit the shape, or a byte above 242.
    """
    _check_length(packed, -(-int(np.prod(shape, dtype=np.int64)) // 5), shape)
    if packed.size and packed.max() > 242:
        raise ValueError(f"byte {packed.max()} is not five base-3 digits: the largest is 242")
    return _DIGITS[packed].reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


def pack_2bit(trits: np.ndarray) -> np.ndarray:
    """Four trits a byte as two's-complement fields, the first in the lowest bits; zeros fill the last byte."""
    flat = checked_trits(trits).reshape(-1)
    padded = np.zeros(-(-flat.size // 4) * 4, np.uint8)
    padded[: flat.size] = flat.view(np.uint8) & 3
    fields = padded.reshape(-1, 4)
    return fields[:, 0] | fields[:, 1] << 2 | fields[:, 2] << 4 | fields[:, 3] << 6


def unpack_2bit(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The int8 trits of `pack_2bit`, in `shape`.

    Raises:
      ValueError: a number of bytes that does not fit the shape, or a field of −2.
    """
    size = int(np.prod(shape, dtype=np.int64))
    _check_length(packed, -(-size // 4), shape)
    # Shifted to the top of an int8, the sign comes back with an arithmetic shift.
    fields = np.stack([packed << shift for shift in (6, 4, 2, 0)], axis=-1).view(np.int8) >> 6
    if fields.size and fields.min() < -1:
        raise ValueError("a 2-bit field holds −2, which is not a trit")
    return fields.reshape(-1)[:size].reshape(shape)


def checked_trits(trits: npt.ArrayLike) -> np.ndarray:
    """Trits as int8 in their shape.

    Raises:
      ValueError: other than integers −1, 0 and +1.
    """
    found = np.asarray(trits)
    if found.dtype.kind not in "iu":  # floats would be cut, and 300 would wrap round to 44
        raise ValueError(f"trits are integers −1, 0 and +1, not {found.dtype}")
    if found.size and (found.min() < -1 or found.max() > 1):
        raise ValueError(f"trits are −1, 0 and +1: found {found.min()} to {found.max()}")
    return np.require(found, np.int8, "C")


def _check_length(packed: np.ndarray, expected: int, shape: tuple[int, ...]) -> None:
    if packed.size != expected:
        raise ValueError(f"{packed.size} packed bytes do not hold the trits of shape {shape}: expected {expected}")


LAYOUT = "rows"

_SHIFTS = np.arange(6, -2, -2, dtype=np.uint8)  # that bring a byte's fields, the first lowest, to its top


def pack_rows(table: TernaryTensor) -> PackedTensor:
    """Four weights a byte as two's-complement fields: data (V, ceil(W / 4)) uint8, bfloat16 scales where exact.

    Raises:
      ValueError: trits that are not integers −1, 0 and +1.
    """
    rows, width = table.shape
    fields = np.pad(checked_trits(table.trits).view(np.uint8) & 3, [(0, 0), (0, -width % 4)])
    fields = fields.reshape(rows, -1, 4)
    data: Any = fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6
    scale: Any = narrow_scale(np.asarray(table.scale, np.float32))
    return PackedTensor(data, scale, (rows, width), table.group, LAYOUT)


def gather_rows(table: PackedTensor, index: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights (…, W) of the rows at `index`.

    Raises:
      TypeError: an index that is not of integers (bools would select), or a dtype that is not floating.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"the index of rows is {index.dtype}: it must be of integers")
    # Shifted to the top of an int8, the sign comes back with an arithmetic shift.
    trits = (table.data[index][..., None] << _SHIFTS).astype(jnp.int8) >> 6
    trits = trits.reshape(*index.shape, -1)[..., : table.shape[1]]
    # A scale that all rows share has one row, which clamping finds for every index.
    scale = jnp.take(table.scale, index, axis=0, mode="clip").astype(jnp.float32)
    return TernaryTensor(trits, scale, table.group, -1).dequantize(dtype)


def narrow_scale(scale: np.ndarray) -> np.ndarray:
    """float32 scales as bfloat16 where that loses nothing, as with the 8 significant bits of `Quantizer`."""
    narrow = scale.astype(jnp.bfloat16)
    return narrow if (narrow == scale).all() else scale
