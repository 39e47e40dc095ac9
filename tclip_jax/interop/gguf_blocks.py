"""llama.cpp's ternary blocks: 256 consecutive weights of a row and their float16 scale, in 54 or 66 bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["tq1_0", "tq2_0"]
Array = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

BLOCK = 256
BLOCK_BYTES: dict[Kind, int] = {"tq1_0": 54, "tq2_0": 66}

# TQ1_0: three runs of a block, each laid out as five rows of digits, the last filled with zeros; a byte holds a column.
_RUNS = ((0, 160), (160, 240), (240, 260))
_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)
# The byte ⌈q · 256/243⌉ is a fraction whose digits come out one by one when it is multiplied by 3.
_BYTE_OF = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)
_NO_DIGIT = 3
_DIGITS_OF = np.full((256, 5), _NO_DIGIT, np.uint8)
_DIGITS_OF[_BYTE_OF] = np.arange(243)[:, None] // _POWERS % 3
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]  # TQ2_0


def encode_blocks(trits: Array, scale: Array, kind: Kind) -> Bytes:
    """The blocks of a weight whose rows are its outputs.

    Args:
      trits: (N, K) of −1, 0, +1; K a multiple of 256.
      scale: (N, K / 256), each a float16 number; 0 only for a block of zero trits.
      kind: "tq1_0", 1.6875 bits a weight, or "tq2_0", 2.0625.

    Returns:
      uint8 (N, K / 256 · 54), or · 66.

    Raises:
      ValueError: shapes, trits or scales that are not so.
    """
    rows, length = trits.shape
    if length % BLOCK or scale.shape != (rows, length // BLOCK):
        raise ValueError(f"trits {trits.shape} with scales {scale.shape}: a scale is for {BLOCK} weights of a row")
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"trits are −1, 0 and +1: found {trits.min()} to {trits.max()}")
    half = as_half(scale)
    digits = (trits.reshape(-1, BLOCK) + 1).astype(np.uint8)
    _check_scales(digits, half.reshape(-1))
    packed = _pack_tq1_0(digits) if kind == "tq1_0" else _pack_tq2_0(digits)
    return np.concatenate([packed, half.reshape(-1, 1).view(np.uint8)], axis=1).reshape(rows, -1)


def decode_blocks(blocks: Bytes, kind: Kind) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Trits (N, K) int8 and scales (N, K / 256) float32 of `encode_blocks`, whose bytes are the only ones accepted.

    Raises:
      ValueError: bytes that no trits are encoded to, a scale that is negative or not finite, or 0 beside trits.
    """
    rows = len(blocks)
    flat = blocks.reshape(-1, BLOCK_BYTES[kind])
    half = np.ascontiguousarray(flat[:, -2:]).view("<f2").reshape(-1)
    digits = _unpack_tq1_0(flat[:, :-2]) if kind == "tq1_0" else _unpack_tq2_0(flat[:, :-2])
    if (digits > 2).any():
        raise ValueError(f"a byte of a {kind} block is no code of trits")
    _check_scales(digits, half)
    return digits.view(np.int8).reshape(rows, -1) - np.int8(1), half.astype(np.float32).reshape(rows, -1)


def as_half(scale: Array) -> npt.NDArray[np.float16]:
    """The scales as little-endian float16.

    Raises:
      ValueError: a scale that this would change, or that is no number.
    """
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    changed = half != scale
    if changed.any():
        raise ValueError(f"scale {scale[changed][0]:.9g} is not a float16 number: scale_bits of 8 or 11 give such")
    return half


def _check_scales(digits: Bytes, half: npt.NDArray[np.float16]) -> None:
    if not np.isfinite(half).all() or np.signbit(half).any():
        raise ValueError("a scale is negative or not finite")
    if (digits[half == 0] != 1).any():
        raise ValueError("a scale is 0 beside trits that are not")


def _pack_tq1_0(digits: Bytes) -> Bytes:
    padded = np.pad(digits, ((0, 0), (0, 4)))
    columns = [_POWERS @ padded[:, start:stop].reshape(len(digits), 5, -1) for start, stop in _RUNS]
    return _BYTE_OF[np.concatenate(columns, axis=1)]


def _unpack_tq1_0(packed: Bytes) -> Bytes:
    runs = [_DIGITS_OF[packed[:, start // 5 : stop // 5]].swapaxes(1, 2) for start, stop in _RUNS]
    digits = np.concatenate([run.reshape(len(packed), -1) for run in runs], axis=1)
    if digits[:, BLOCK:].any():
        raise ValueError("the last bytes of a tq1_0 block hold more than four trits each")
    return np.ascontiguousarray(digits[:, :BLOCK])


def _pack_tq2_0(digits: Bytes) -> Bytes:
    return np.bitwise_or.reduce(digits.reshape(-1, 2, 4, 32) << _SHIFTS, axis=2).reshape(len(digits), -1)


def _unpack_tq2_0(packed: Bytes) -> Bytes:
    return (packed.reshape(-1, 2, 1, 32) >> _SHIFTS & np.uint8(3)).reshape(len(packed), -1)
