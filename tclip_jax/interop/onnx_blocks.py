"""Ternary weights as blocks of 2-bit codes with a scale each, in the layout of ONNX Runtime's operators, and back.

`MatMulNBits` and `GatherBlockQuantized` (domain com.microsoft) read (code − 2) · scale, so the code of a trit is
trit + 2. https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import input_axis
from tclip_jax.ternary import TernaryTensor

# The blocks for which ONNX Runtime has a 2-bit product; with any other it silently expands the weight to floats.
BLOCKS = (128, 64, 32)
_ZERO = 2  # the code of a zero: the default zero point, 2^(bits − 1)


class Blocks(NamedTuple):
    """Rows of 2-bit codes, each cut into blocks of consecutive inputs; zeros fill the last block.

    Attributes:
      codes: uint8 (N, ceil(K / block) · block / 4), four codes a byte, the first in the lowest bits. The rows of a
        table may end with its last input, after ceil(K / 4) bytes.
      scale: (N, ceil(K / block)), float32 or float16.
      block: inputs of a block, one of `BLOCKS`.
      length: K, the number of inputs.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.floating]
    block: int
    length: int


def find_block(path: str, weight: TernaryTensor) -> int:
    """Return the largest block that holds the groups of a weight, whose scales are repeated for each block.

    Args:
      path: path of the parameter, for the message.
      weight: trits (..., K, N), or (V, W) for a table.

    Raises:
      ValueError: no block holds the groups; the message has the path and what would fit.
    """
    length, count, group = weight.shape[weight.axis], weight.scale.shape[weight.axis], weight.group
    # A weight of few inputs gets the smallest block that holds them all.
    fitting = [block for block in BLOCKS if (count == 1 or group % block == 0) and (block < 2 * length or block == 32)]
    if weight.axis != input_axis(path) or not fitting:
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: ONNX Runtime has 2-bit products for blocks of 32, 64"
            " and 128 inputs, so the group must be a multiple of 32, or the quantizer must have one scale a channel"
        )
    return fitting[0]


def encode_blocks(path: str, weight: TernaryTensor, dtype: str) -> Blocks:
    """Encode one layer of a ternary weight.

    Args:
      path: path of the parameter, for messages.
      weight: trits (K, N), or (V, W) for a table, which becomes V rows.
      dtype: dtype of the scales, "float32" or "float16".

    Raises:
      ValueError: no block holds the groups, a value is not a trit, or a scale is not exact in `dtype` or not finite.
    """
    block, length = find_block(path, weight), weight.shape[weight.axis]
    trits, scale = (np.moveaxis(np.asarray(each), weight.axis, -1) for each in (weight.trits, weight.scale))
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"{path}: trits are −1, 0 and +1: found {trits.min()} to {trits.max()}")
    with np.errstate(over="ignore"):
        narrow = scale.astype(dtype)
    if not np.isfinite(narrow).all() or (narrow != scale).any():
        wrong = scale[~np.isfinite(narrow) | (narrow != scale)][0]
        raise ValueError(f"{path}: scale {wrong:.9g} is not exact in {dtype}: export with --dtype float32")
    count = -(-length // block)
    times = count if scale.shape[-1] == 1 else weight.group // block
    repeated = np.broadcast_to(narrow.repeat(times, axis=-1)[..., :count], (len(trits), count))
    fields = np.full((len(trits), count * block), _ZERO, np.uint8)
    fields[:, :length] = trits + np.int8(_ZERO)
    a, b, c, d = (fields[:, i::4] for i in range(4))
    codes = (a | b << 2 | c << 4 | d << 6).astype(np.uint8)
    return Blocks(codes, np.ascontiguousarray(repeated), block, length)


def decode_blocks(blocks: Blocks) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode blocks, the inverse of `encode_blocks`.

    Returns:
      Trits int8 (N, K), and the scale of each of them, float32 (N, K).

    Raises:
      ValueError: a code is no trit, or a shape is wrong.
    """
    count = -(-blocks.length // blocks.block)
    rows = len(blocks.codes)
    widths = (count * blocks.block // 4, -(-blocks.length // 4))
    if blocks.codes.shape not in [(rows, width) for width in widths] or blocks.scale.shape != (rows, count):
        raise ValueError(
            f"codes {blocks.codes.shape} and scales {blocks.scale.shape} do not hold {blocks.length} inputs in blocks"
            f" of {blocks.block}"
        )
    fields = np.stack([blocks.codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(rows, -1)
    if not fields[:, : blocks.length].all():
        raise ValueError("a 2-bit code is 0, which is no trit")
    trits = fields[:, : blocks.length].astype(np.int8) - np.int8(_ZERO)
    scale = blocks.scale.astype(np.float32).repeat(blocks.block, axis=-1)[:, : blocks.length]
    return trits, scale
