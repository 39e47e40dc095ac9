"""Packing of trits into bytes, for disk and memory, and embedding tables packed by rows."""

from __future__ import annotations

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
    """Pack four consecutive trits along `axis` into a byte; zeros fill the last byte. `join_2bit` defines the bits.

    Args:
      trits: integers −1, 0 and +1, a NumPy or JAX array (..., K, ...).
      axis: the axis of size K.

    Returns:
      uint8 (..., ceil(K / 4), ...), a NumPy or JAX array like `trits`.

    Raises:
      ValueError: a NumPy array has a value that is not a trit; JAX arrays are not checked.
    """
    xp: Any = np if isinstance(trits, np.ndarray) else jnp
    trits, axis = checked_trits(trits) if xp is np else trits, axis % trits.ndim
    padded = xp.pad(trits, [(0, -trits.shape[axis] % 4 if i == axis else 0) for i in range(trits.ndim)])
    fields = padded.reshape(*trits.shape[:axis], padded.shape[axis] // 4, 4, *trits.shape[axis + 1 :])
    return join_2bit([xp.take(fields, i, axis=axis + 1) for i in range(4)])


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
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    axis %= packed.ndim
    if packed.shape[axis] != -(-length // 4):
        raise ValueError(f"{packed.shape[axis]} bytes do not hold {length} trits: expected {-(-length // 4)}")
    fields = xp.stack(split_2bit(packed), axis=axis + 1)
    if xp is np and fields.size and fields.min() < -1:
        raise ValueError("a 2-bit field holds −2, which is not a trit")
    trits = fields.reshape(*packed.shape[:axis], 4 * packed.shape[axis], *packed.shape[axis + 1 :])
    return trits[(slice(None),) * axis + (slice(length),)]


def join_2bit(fields: Sequence[Any]) -> Any:
    """Join four arrays of trits into one of uint8: two's-complement fields of 2 bits, the first array lowest."""
    a, b, c, d = (field.astype(np.uint8) & 3 for field in fields)
    return a | b << 2 | c << 4 | d << 6


def split_2bit(packed: Any) -> list[Any]:
    """Undo `join_2bit`: four int8 arrays of trits."""
    # Each field moves to the top of an int8; the arithmetic shift back extends its sign.
    return [(packed << shift).astype(np.int8) >> 6 for shift in (6, 4, 2, 0)]


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
