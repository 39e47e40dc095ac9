"""Packing of trits and other small integers into bytes, for disk and memory, and embedding tables packed by rows."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor

_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3).astype(np.int8) - 1  # the five trits of each byte


def pack_base3(trits: np.ndarray) -> np.ndarray:
    """Pack five trits into a byte in base 3: Σ (t_i + 1) · 3^i for i = 0 … 4.

    Args:
      trits: integers −1, 0 and +1, any shape. They are packed in C order; zero trits fill the last byte.

    Returns:
      uint8 (ceil(size / 5),), each at most 242.

    Raises:
      ValueError: a value is not a trit.
    """
    flat = checked_trits(trits).reshape(-1)
    padded = np.zeros(-(-flat.size // 5) * 5, np.int8)
    padded[: flat.size] = flat
    return (padded.reshape(-1, 5) + 1).astype(np.uint8) @ _POWERS


def unpack_base3(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `pack_base3`.

    Args:
      packed: uint8 (ceil(size / 5),).
      shape: shape of the trits.

    Returns:
      int8 trits in `shape`.

    Raises:
      ValueError: the number of bytes does not fit the shape, or a byte is above 242.
    """
    _check_length(packed, -(-int(np.prod(shape, dtype=np.int64)) // 5), shape)
    if packed.size and packed.max() > 242:
        raise ValueError(f"byte {packed.max()} is not five base-3 digits: the largest is 242")
    return _DIGITS[packed].reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


def pack_2bit(trits: Any, axis: int = -1) -> Any:
    """Pack four consecutive trits along `axis` into a byte, with `pack_fields`.

    Args:
      trits: integers −1, 0 and +1, a NumPy or JAX array (..., K, ...).
      axis: the axis of size K.

    Returns:
      uint8 (..., ceil(K / 4), ...), a NumPy or JAX array like `trits`.

    Raises:
      ValueError: a NumPy array has a value that is not a trit; JAX arrays are not checked.
    """
    return pack_fields(checked_trits(trits) if isinstance(trits, np.ndarray) else trits, 2, axis)


def unpack_2bit(packed: Any, length: int, axis: int = -1) -> Any:
    """Undo `pack_2bit`.

    Args:
      packed: uint8, a NumPy or JAX array.
      length: number of trits along `axis`.
      axis: the packed axis.

    Returns:
      int8 trits, a NumPy or JAX array like `packed`.

    Raises:
      ValueError: the number of bytes does not fit `length`, or a NumPy array has a field of −2; JAX arrays are not
        checked for it.
    """
    trits = unpack_fields(packed, 2, length, axis)
    if isinstance(trits, np.ndarray) and trits.size and trits.min() < -1:
        raise ValueError("a 2-bit field holds −2, which is not a trit")
    return trits


def pack_fields(integers: Any, bits: int, axis: int = -1) -> Any:
    """Pack 8 / `bits` consecutive integers along `axis` into a byte; zeros fill the last byte.

    Args:
      integers: signed integers of `bits` bits, a NumPy or JAX array (..., K, ...).
      bits: 2, 4 or 8. `join_fields` defines their order.
      axis: the axis of size K.

    Returns:
      uint8 (..., ceil(K · bits / 8), ...), a NumPy or JAX array like `integers`.
    """
    xp: Any = np if isinstance(integers, np.ndarray) else jnp
    shape, axis, many = integers.shape, axis % integers.ndim, 8 // bits
    padded = xp.pad(integers, [(0, -shape[axis] % many if i == axis else 0) for i in range(len(shape))])
    fields = padded.reshape(*shape[:axis], padded.shape[axis] // many, many, *shape[axis + 1 :])
    return join_fields([xp.take(fields, i, axis=axis + 1) for i in range(many)], bits)


def unpack_fields(packed: Any, bits: int, length: int, axis: int = -1) -> Any:
    """Undo `pack_fields`.

    Args:
      packed: uint8, a NumPy or JAX array.
      bits: 2, 4 or 8.
      length: number of integers along `axis`.
      axis: the packed axis.

    Returns:
      int8, a NumPy or JAX array like `packed`.

    Raises:
      ValueError: the number of bytes does not fit `length`.
    """
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    axis, many = axis % packed.ndim, 8 // bits
    if packed.shape[axis] != -(-length // many):
        what = "trits" if bits == 2 else f"integers of {bits} bits"
        raise ValueError(f"{packed.shape[axis]} bytes do not hold {length} {what}: expected {-(-length // many)}")
    fields = xp.stack(split_fields(packed, bits), axis=axis + 1)
    integers = fields.reshape(*packed.shape[:axis], many * packed.shape[axis], *packed.shape[axis + 1 :])
    return integers[(slice(None),) * axis + (slice(length),)]


def join_fields(fields: Sequence[Any], bits: int) -> Any:
    """Join 8 / `bits` arrays of integers into one of uint8: two's-complement fields, the first array lowest."""
    parts = [(field.astype(np.uint8) & (2**bits - 1)) << bits * i for i, field in enumerate(fields)]
    return functools.reduce(operator.or_, parts)


def split_fields(packed: Any, bits: int) -> list[Any]:
    """Undo `join_fields`: 8 / `bits` int8 arrays."""
    # Each field moves to the top of an int8; the arithmetic shift back extends its sign.
    return [(packed << shift).astype(np.int8) >> 8 - bits for shift in range(8 - bits, -1, -bits)]


def checked_trits(trits: npt.ArrayLike) -> np.ndarray:
    """Return trits as a C-contiguous int8 array of the same shape.

    Raises:
      ValueError: the values are not integers −1, 0 and +1.
    """
    found = np.asarray(trits)
    if found.dtype.kind not in "iu":  # the cast would truncate floats and wrap 300 to 44
        raise ValueError(f"trits are integers −1, 0 and +1, not {found.dtype}")
    if found.size and (found.min() < -1 or found.max() > 1):
        raise ValueError(f"trits are −1, 0 and +1: found {found.min()} to {found.max()}")
    return np.require(found, np.int8, "C")


def _check_length(packed: np.ndarray, expected: int, shape: tuple[int, ...]) -> None:
    if packed.size != expected:
        raise ValueError(f"{packed.size} packed bytes do not hold the trits of shape {shape}: expected {expected}")


LAYOUT = "rows"


def pack_rows(table: TernaryTensor) -> PackedTensor:
    """Pack an embedding table by rows, four weights to a byte.

    Args:
      table: trits (V, W) and their scales, with `axis` −1.

    Returns:
      A packed table: data uint8 (V, ceil(W / 4)), scales in bfloat16 where that is exact, otherwise in float32.

    Raises:
      ValueError: the trits are not integers −1, 0 and +1.
    """
    scale: Any = narrow_scale(np.asarray(table.scale, np.float32))
    rows, width = table.shape
    return PackedTensor(pack_2bit(np.asarray(table.trits)), scale, (rows, width), table.group, LAYOUT)


def gather_rows(table: PackedTensor, index: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Look up rows of a packed embedding table.

    Args:
      table: from `pack_rows`.
      index: row numbers, integers (...).
      dtype: dtype of the result, floating.

    Returns:
      Weights (..., W) in `dtype`.

    Raises:
      TypeError: `index` is not of integers (bools would be a mask), or `dtype` is not floating.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"the index of rows is {index.dtype}: it must be of integers")
    trits = unpack_2bit(table.data[index], table.layer_shape[1])
    # If all rows share a scale, it has one row; "clip" maps every index to it.
    scale = jnp.take(table.scale, index, axis=0, mode="clip").astype(jnp.float32)
    return TernaryTensor(trits, scale, table.group, -1).dequantize(dtype)


def narrow_scale(scale: np.ndarray) -> np.ndarray:
    """Cast float32 scales to bfloat16 if that is exact, as for scales of 8 significant bits."""
    narrow = scale.astype(jnp.bfloat16)
    return narrow if (narrow == scale).all() else scale
