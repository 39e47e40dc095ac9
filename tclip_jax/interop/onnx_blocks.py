"""Quantized weights as blocks of codes with a scale each, in the layout of ONNX Runtime's operators, and back.

`MatMulNBits` and `GatherBlockQuantized` (domain com.microsoft) read (code − zero) · scale, where the zero point of b
bits is 2^(b − 1). So the code of a trit, in 2 bits, is trit + 2; of an integer of 4 bits + 8; of 8 bits + 128.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import input_axis
from tclip_jax.ternary import QuantizedTensor, UniformTensor
from tclip_jax.ternary.packing import pack_fields
from tclip_jax.ternary.uniform import largest_integer

# The blocks for which ONNX Runtime has a 2-bit product; with any other it silently expands the weight to floats.
BLOCKS = (128, 64, 32)
WIDTHS = (2, 4, 8)


class Blocks(NamedTuple):
    """Rows of codes, each cut into blocks of consecutive inputs; zeros fill the last block.

    Attributes:
      codes: uint8 (N, ceil(K / block) · block · bits / 8), the first code in the lowest bits of a byte. The rows of a
        table may end with its last input, after ceil(K · bits / 8) bytes.
      scale: (N, ceil(K / block)), float32 or float16.
      block: inputs of a block, one of `BLOCKS`.
      length: K, the number of inputs.
      bits: of a code: 2 for trits, 4 or 8.
    """

    codes: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.floating]
    block: int
    length: int
    bits: int = 2


def code_bits(weight: QuantizedTensor) -> int:
    """Return the bits of a weight's codes."""
    return weight.bits if isinstance(weight, UniformTensor) else 2


def find_block(path: str, weight: QuantizedTensor) -> int:
    """Return the largest block that holds the groups of a weight, whose scales are repeated for each block.

    Args:
      path: path of the parameter, for the message.
      weight: trits or integers (..., K, N), or (V, W) for a table.

    Raises:
      ValueError: no block holds the groups; the message has the path and what would fit.
    """
    length, count, group = weight.shape[weight.axis], weight.scale.shape[weight.axis], weight.group
    # A weight of few inputs gets the smallest block that holds them all.
    fitting = [block for block in BLOCKS if (count == 1 or group % block == 0) and (block < 2 * length or block == 32)]
    if weight.axis != input_axis(path) or not fitting:
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: ONNX Runtime has {code_bits(weight)}-bit products for"
            " blocks of 32, 64 and 128 inputs, so the group must be a multiple of 32, or the quantizer must have one"
            " scale a channel"
        )
    return fitting[0]


def encode_blocks(path: str, weight: QuantizedTensor, dtype: str) -> Blocks:
    """Encode one layer of a quantized weight.

    Args:
      path: path of the parameter, for messages.
      weight: trits or integers (K, N), or (V, W) for a table, which becomes V rows.
      dtype: dtype of the scales, "float32" or "float16".

    Raises:
      ValueError: no block holds the groups, a value is beyond its bits, or a scale is not exact in `dtype` or finite.
    """
    block, length, bits = find_block(path, weight), weight.shape[weight.axis], code_bits(weight)
    integers, scale = (np.moveaxis(np.asarray(each), weight.axis, -1) for each in (weight.integers, weight.scale))
    scale, largest, zero = scale.astype(np.float32), largest_integer(bits), 2 ** (bits - 1)
    if integers.size and not -largest <= integers.min() <= integers.max() <= largest:
        what = "trits are −1, 0 and +1" if bits == 2 else f"integers of {bits} bits are −{largest} to {largest}"
        raise ValueError(f"{path}: {what}: found {integers.min()} to {integers.max()}")
    with np.errstate(over="ignore"):
        narrow = scale.astype(dtype)
    if not np.isfinite(narrow).all() or (narrow != scale).any():
        wrong = scale[~np.isfinite(narrow) | (narrow != scale)][0]
        raise ValueError(f"{path}: scale {wrong:.9g} is not exact in {dtype}: export with --dtype float32")
    count = -(-length // block)
    times = count if scale.shape[-1] == 1 else weight.group // block
    repeated = np.broadcast_to(narrow.repeat(times, axis=-1)[..., :count], (len(integers), count))
    fields = np.full((len(integers), count * block), zero, np.uint8)
    fields[:, :length] = integers.astype(np.int16) + zero
    return Blocks(pack_fields(fields, bits), np.ascontiguousarray(repeated), block, length, bits)


def decode_blocks(blocks: Blocks) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode blocks, the inverse of `encode_blocks`.

    Returns:
      Trits or integers int8 (N, K), and the scale of each of them, float32 (N, K).

    Raises:
      ValueError: a code is no trit or integer, or a shape is wrong.
    """
    count, bits, rows = -(-blocks.length // blocks.block), blocks.bits, len(blocks.codes)
    widths = (count * blocks.block * bits // 8, -(-blocks.length * bits // 8))
    if blocks.codes.shape not in [(rows, width) for width in widths] or blocks.scale.shape != (rows, count):
        raise ValueError(
            f"codes {blocks.codes.shape} and scales {blocks.scale.shape} do not hold {blocks.length} inputs in blocks"
            f" of {blocks.block}"
        )
    shifts, mask = range(0, 8, bits), np.uint8(2**bits - 1)
    fields = np.stack([blocks.codes >> shift & mask for shift in shifts], axis=-1).reshape(rows, -1)
    if not fields[:, : blocks.length].all():
        meaning = "no trit" if bits == 2 else f"below −{largest_integer(bits)}"
        raise ValueError(f"a {bits}-bit code is 0, which is {meaning}")
    integers = (fields[:, : blocks.length].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    scale = blocks.scale.astype(np.float32).repeat(blocks.block, axis=-1)[:, : blocks.length]
    return integers, scale
