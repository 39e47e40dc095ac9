"""An embedding table packed by rows, of which only the gathered ones are unpacked."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.ternary.packed import PackedTensor
from tclip_jax.ternary.packing import checked_trits
from tclip_jax.ternary.tensor import TernaryTensor

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
