"""Trits in bytes, for disk and memory, and an embedding table packed by rows."""

from __future__ import annotations

from collections.abc import Sequence
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


def pack_2bit(trits: Any, axis: int = -1) -> Any:
    """Four consecutive trits along `axis` a byte; zeros fill the last one. NumPy or JAX, as given; see `join_2bit`.

    Raises:
      ValueError: NumPy integers that are not trits.
    """
    xp: Any = np if isinstance(trits, np.ndarray) else jnp
    trits, axis = checked_trits(trits) if xp is np else trits, axis % trits.ndim
    padded = xp.pad(trits, [(0, -trits.shape[axis] % 4 if i == axis else 0) for i in range(trits.ndim)])
    fields = padded.reshape(*trits.shape[:axis], padded.shape[axis] // 4, 4, *trits.shape[axis + 1 :])
    return join_2bit([xp.take(fields, i, axis=axis + 1) for i in range(4)])


def unpack_2bit(packed: Any, length: int, axis: int = -1) -> Any:
    """The int8 trits of `pack_2bit`, `length` along `axis`.

    Raises:
      ValueError: a number of bytes that does not fit the length, or a field of −2 in a NumPy array.
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
    """Four arrays of trits as one of uint8: two's-complement fields of two bits, the first array's the lowest."""
    a, b, c, d = (field.astype(np.uint8) & 3 for field in fields)
    return a | b << 2 | c << 4 | d << 6


def split_2bit(packed: Any) -> list[Any]:
    """The four int8 arrays of `join_2bit`."""
    # Shifted to the top of an int8, the sign comes back with an arithmetic shift.
    return [(packed << shift).astype(np.int8) >> 6 for shift in (6, 4, 2, 0)]


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


def pack_rows(table: TernaryTensor) -> PackedTensor:
    """Four weights a byte as two's-complement fields: data (V, ceil(W / 4)) uint8, bfloat16 scales where exact.

    Raises:
      ValueError: trits that are not integers −1, 0 and +1.
    """
    scale: Any = narrow_scale(np.asarray(table.scale, np.float32))
    rows, width = table.shape
    return PackedTensor(pack_2bit(np.asarray(table.trits)), scale, (rows, width), table.group, LAYOUT)


def gather_rows(table: PackedTensor, index: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights (…, W) of the rows at `index`.

    Raises:
      TypeError: an index that is not of integers (bools would select), or a dtype that is not floating.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"the index of rows is {index.dtype}: it must be of integers")
    trits = unpack_2bit(table.data[index], table.shape[1])
    # A scale that all rows share has one row, which clamping finds for every index.
    scale = jnp.take(table.scale, index, axis=0, mode="clip").astype(jnp.float32)
    return TernaryTensor(trits, scale, table.group, -1).dequantize(dtype)


def narrow_scale(scale: np.ndarray) -> np.ndarray:
    """float32 scales as bfloat16 where that loses nothing, as with the 8 significant bits of `Quantizer`."""
    narrow = scale.astype(jnp.bfloat16)
    return narrow if (narrow == scale).all() else scale
