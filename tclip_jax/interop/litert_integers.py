"""Quantized weights as LiteRT's INT4 and INT8 tensors, and back.

A value is code · scale with signed codes of 4 or 8 bits, so the code of a trit or an integer is itself; trits are INT4.
A tensor has one float32 scale a row, or if INT4 float16 scales of blocks along the rows ("blockwise"). The products of
CPUs take blocks of any multiple of 32; with others LiteRT computes them a hundred times slower.
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import input_axis
from tclip_jax.ternary import QuantizedTensor, UniformTensor
from tclip_jax.ternary.packing import pack_fields, unpack_fields
from tclip_jax.ternary.uniform import check_integers

BLOCK = 32  # every block is a multiple of it


class Integers(NamedTuple):
    """A matrix of trits or integers, one row for each output or entry; zeros fill the last block or byte of a row.

    Attributes:
      codes: uint8 (N · K · bits / 8); of 4 bits two codes a byte, the first in the lowest bits.
      shape: (N, K).
      scale: float32 (N,), one for each row; or float16 (N, K / block).
      bits: 4 or 8.
    """

    codes: npt.NDArray[np.uint8]
    shape: tuple[int, int]
    scale: npt.NDArray[np.floating]
    bits: int = 4

    @property
    def block(self) -> int | None:
        """Inputs of a block; None for one scale a row."""
        return self.shape[1] // self.scale.shape[1] if self.scale.ndim == 2 else None


def encode_integers(path: str, weight: QuantizedTensor) -> Integers:
    """Encode one layer of a quantized weight.

    A scale of zero, which only groups of zeros have, is stored as one: LiteRT refuses zero.

    Args:
      path: path of the parameter, for messages.
      weight: trits or integers (K, N), or (V, W) for a table.

    Raises:
      ValueError: INT4 or INT8 cannot hold the groups, a value is beyond its bits, or a scale is not exact; the message
        names it.
    """
    length, count, group = weight.shape[weight.axis], weight.scale.shape[weight.axis], weight.group
    bits = weight.bits if isinstance(weight, UniformTensor) else 4
    if bits == 8 and count > 1:
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: LiteRT has INT8 products with one scale a row, so the"
            " quantizer must have one scale a channel"
        )
    if weight.axis != input_axis(path) or (count > 1 and group % BLOCK):
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: LiteRT has INT4 products for blocks of a multiple of"
            f" {BLOCK} inputs, so the group must be one, or the quantizer must have one scale a channel"
        )
    integers, scale = (np.moveaxis(np.asarray(each), weight.axis, -1) for each in (weight.integers, weight.scale))
    if isinstance(weight, UniformTensor):
        try:
            check_integers(integers, bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    elif integers.size and not -1 <= integers.min() <= integers.max() <= 1:
        raise ValueError(f"{path}: trits are −1, 0 and +1: found {integers.min()} to {integers.max()}")
    unit = 8 // bits if count == 1 else BLOCK  # the rows of a table must end with a byte
    fields = np.zeros((len(integers), -(-length // unit) * unit), np.int8)
    fields[:, :length] = integers
    dtype: type[np.floating] = np.float32 if count == 1 else np.float16
    block = fields.shape[1] if count == 1 else math.gcd(group, fields.shape[1])
    used = fields.reshape(len(integers), -1, block).any(axis=-1)
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
    codes = pack_fields(fields.reshape(-1), bits)
    return Integers(codes, (len(fields), fields.shape[1]), narrow[:, 0] if count == 1 else narrow, bits)


def decode_integers(matrix: Integers) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode a matrix, the inverse of `encode_integers`.

    Returns:
      Trits or integers int8 (N, K), and the scale of each of them, float32 (N, K).

    Raises:
      ValueError: a code is below the symmetric range, or a shape is wrong.
    """
    rows, columns = matrix.shape
    blocks = matrix.scale.shape[1] if matrix.scale.ndim == 2 else 1
    fits = blocks > 0 and columns % blocks == 0 and matrix.scale.size == rows * blocks
    if matrix.codes.size * 8 != rows * columns * matrix.bits or not fits:
        raise ValueError(
            f"{matrix.codes.size} bytes and scales {matrix.scale.shape} do not hold {rows} rows of {columns}"
        )
    integers = unpack_fields(matrix.codes, matrix.bits, rows * columns).reshape(rows, columns)
    check_integers(integers, matrix.bits)
    scale = matrix.scale.astype(np.float32).reshape(rows, blocks).repeat(columns // blocks, axis=1)
    return integers, scale


def is_rounded(matrix: Integers) -> bool:
    """Whether LiteRT's product rounds a scale: on CPUs it computes with the scales of blocks in bfloat16."""
    return matrix.block is not None and bool((matrix.scale.astype(jnp.bfloat16) != matrix.scale).any())
