"""Ternary weights as LiteRT's INT4 tensors, and back.

A value is code · scale with codes from −8 to 7, so the code of a trit is the trit. A tensor has one float32 scale a
row, or float16 scales of blocks along the rows ("blockwise"). The products of CPUs take blocks of any multiple of 32;
with others LiteRT computes them a hundred times slower.
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import input_axis
from tclip_jax.ternary import TernaryTensor

BLOCK = 32  # every block is a multiple of it
_PAIR = 2  # codes of a byte; the rows of a table must end with a byte


class Int4(NamedTuple):
    """A matrix of trits, one row for each output or entry; zeros fill the last block or byte of a row.

    Attributes:
      codes: uint8 (N · K / 2), two codes a byte, the first in the lowest bits.
      shape: (N, K).
      scale: float32 (N,), one for each row; or float16 (N, K / block).
    """

    codes: npt.NDArray[np.uint8]
    shape: tuple[int, int]
    scale: npt.NDArray[np.floating]

    @property
    def block(self) -> int | None:
        """Inputs of a block; None for one scale a row."""
        return self.shape[1] // self.scale.shape[1] if self.scale.ndim == 2 else None


def encode_int4(path: str, weight: TernaryTensor) -> Int4:
    """Encode one layer of a ternary weight.

    A scale of zero, which only groups without other trits have, is stored as one: LiteRT refuses zero.

    Args:
      path: path of the parameter, for messages.
      weight: trits (K, N), or (V, W) for a table.

    Raises:
      ValueError: INT4 cannot hold the groups, a value is not a trit, or a scale is not exact; the message names it.
    """
    length, count, group = weight.shape[weight.axis], weight.scale.shape[weight.axis], weight.group
    if weight.axis != input_axis(path) or (count > 1 and group % BLOCK):
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: LiteRT has INT4 products for blocks of a multiple of"
            f" {BLOCK} inputs, so the group must be one, or the quantizer must have one scale a channel"
        )
    trits, scale = (np.moveaxis(np.asarray(each), weight.axis, -1) for each in (weight.trits, weight.scale))
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"{path}: trits are −1, 0 and +1: found {trits.min()} to {trits.max()}")
    unit = _PAIR if count == 1 else BLOCK
    fields = np.zeros((len(trits), -(-length // unit) * unit), np.int8)
    fields[:, :length] = trits
    dtype: type[np.floating] = np.float32 if count == 1 else np.float16
    block = fields.shape[1] if count == 1 else math.gcd(group, fields.shape[1])
    used = fields.reshape(len(trits), -1, block).any(axis=-1)
    times = 1 if count == 1 else group // block
    scale = np.broadcast_to(scale.repeat(times, axis=-1)[:, : used.shape[1]], used.shape).astype(np.float32)
    scale = np.where((scale == 0) & ~used, 1, scale)
    with np.errstate(over="ignore"):
        narrow = scale.astype(dtype)
    exact = (narrow == scale) & (scale >= np.finfo(np.float32).tiny) & np.isfinite(narrow)
    if not exact.all():
        raise ValueError(
            f"{path}: scale {scale[~exact][0]:.9g} is not a positive {dtype.__name__}, which LiteRT's"
            f" {'rows' if count == 1 else 'blocks'} have: quantize with scales that are exact in it"
        )
    nibbles = fields.reshape(-1, _PAIR).astype(np.uint8) & 15
    codes = (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8)
    return Int4(codes, (len(fields), fields.shape[1]), narrow[:, 0] if count == 1 else narrow)


def decode_int4(matrix: Int4) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode a matrix, the inverse of `encode_int4`.

    Returns:
      Trits int8 (N, K), and the scale of each of them, float32 (N, K).

    Raises:
      ValueError: a code is no trit, or a shape is wrong.
    """
    rows, columns = matrix.shape
    blocks = matrix.scale.shape[1] if matrix.scale.ndim == 2 else 1
    fits = blocks > 0 and columns % blocks == 0 and matrix.scale.size == rows * blocks
    if matrix.codes.size * _PAIR != rows * columns or not fits:
        raise ValueError(
            f"{matrix.codes.size} bytes and scales {matrix.scale.shape} do not hold {rows} rows of {columns}"
        )
    nibbles = np.stack([matrix.codes & 15, matrix.codes >> 4], axis=-1).reshape(rows, columns)
    trits = (nibbles.astype(np.int8) ^ 8) - np.int8(8)  # a code of 4 bits is signed
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"an INT4 code is {trits.min()} or {trits.max()}, which is no trit")
    scale = matrix.scale.astype(np.float32).reshape(rows, blocks).repeat(columns // blocks, axis=1)
    return trits, scale


def is_rounded(matrix: Int4) -> bool:
    """Whether LiteRT's product rounds a scale: on CPUs it computes with the scales of blocks in bfloat16."""
    return matrix.block is not None and bool((matrix.scale.astype(jnp.bfloat16) != matrix.scale).any())
