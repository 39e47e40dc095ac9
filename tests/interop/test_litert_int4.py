"""INT4 matrices: trits and scales to the bit, and what they cannot hold. Needs no LiteRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.interop.litert_int4 import BLOCK, Int4, decode_int4, encode_int4, is_rounded
from tclip_jax.ternary import TernaryTensor
from tests.interop.model_shapes import ternary

FC1, TABLE = "image/blocks/0/mlp/fc1/kernel", "text/token_embedding/embedding"


@settings(max_examples=60)
@given(
    length=st.integers(1, 700),
    outputs=st.integers(1, 5),
    group=st.sampled_from([16, 32, 64, 96, 128, 256, 384, 512, 1000]),
    axis=st.sampled_from([-2, -1]),
    seed=st.integers(0, 99),
)
def test_int4_holds_every_trit_and_scale(length: int, outputs: int, group: int, axis: int, seed: int) -> None:
    group = min(group, length)
    weight = ternary((length, outputs) if axis == -2 else (outputs, length), group, axis, seed)
    path = FC1 if axis == -2 else TABLE
    if weight.scale.shape[axis] > 1 and group % BLOCK:
        with pytest.raises(ValueError, match=f"{path} has groups of {group} along {length} inputs"):
            encode_int4(path, weight)
        return
    matrix = encode_int4(path, weight)
    rows, columns = matrix.shape
    assert matrix.codes.nbytes == rows * columns / 2 and rows == outputs and 0 <= columns - length < BLOCK
    assert (matrix.block is None) == (length == group) and (matrix.block or BLOCK) % BLOCK == 0
    trits, scale = decode_int4(matrix)
    assert not trits[:, length:].any()
    trits, scale = trits[:, :length], scale[:, :length]
    np.testing.assert_array_equal(trits.T if axis == -2 else trits, weight.trits)
    np.testing.assert_array_equal((trits * scale).T if axis == -2 else trits * scale, weight.dequantize())


@pytest.mark.parametrize(
    ("length", "group", "columns", "block"),
    [(768, 256, 768, 256), (1408, 256, 1408, 128), (4304, 256, 4320, 32), (640, 96, 640, 32), (97, 97, 98, None)],
)
def test_the_largest_block_that_fits(length: int, group: int, columns: int, block: int | None) -> None:
    matrix = encode_int4(FC1, ternary((length, 3), group))
    assert matrix.shape == (3, columns) and matrix.block == block


def test_the_first_code_is_in_the_lowest_bits() -> None:
    trits: Any = np.array([[1], [-1], [0], [1]], np.int8)
    scale: Any = np.full((1, 1), 0.5, np.float32)
    assert encode_int4(FC1, TernaryTensor(trits, scale, 4)).codes.tolist() == [0xF1, 0x10]


def test_a_scale_of_zero_is_stored_as_one() -> None:
    weight = ternary((64, 2), 32)
    trits, scale = np.array(weight.trits), np.array(weight.scale)
    trits[:32, 1], scale[0, 1] = 0, 0
    matrix = encode_int4(FC1, TernaryTensor(trits, scale, 32))  # type: ignore[arg-type]
    assert matrix.scale[1, 0] == 1
    found, scales = decode_int4(matrix)
    np.testing.assert_array_equal((found * scales).T, trits * scale.repeat(32, axis=0))


@pytest.mark.parametrize(
    ("scale", "group", "message"),
    [
        (0.1, 32, "scale 0.100000001 is not a positive float16, which LiteRT's blocks have"),
        (1e6, 32, "scale 1000000 is not a positive float16"),
        (np.nan, 32, "scale nan is not a positive float16"),
        (0.0, 32, "scale 0 is not a positive float16"),
        (-0.5, 64, "scale -0.5 is not a positive float32, which LiteRT's rows have"),
        (1e-40, 64, "is not a positive float32"),  # XNNPACK refuses subnormal scales
        (np.inf, 64, "scale inf is not a positive float32"),
    ],
)
def test_a_scale_that_is_not_exact_is_refused(scale: float, group: int, message: str) -> None:
    weight = ternary((64, 2), group)
    scales: Any = np.full(weight.scale.shape, scale, np.float32)
    with pytest.raises(ValueError, match=f"^{FC1}: .*{message}"):
        encode_int4(FC1, TernaryTensor(weight.trits, scales, group))


def test_what_is_no_trit_is_refused() -> None:
    weight = ternary((64, 2), 32)
    trits: Any = np.full((64, 2), 2, np.int8)
    with pytest.raises(ValueError, match=r"trits are −1, 0 and \+1: found 2 to 2"):
        encode_int4(FC1, TernaryTensor(trits, weight.scale, 32))
    codes, scale = np.full(4, 0x21, np.uint8), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="an INT4 code is 1 or 2, which is no trit"):
        decode_int4(Int4(codes, (2, 4), scale))
    for wrong in (codes[:3], np.zeros((2, 3), np.float16), np.zeros((2, 0), np.float16)):
        broken = Int4(wrong, (2, 4), scale) if wrong.dtype == np.uint8 else Int4(codes, (2, 4), wrong)
        with pytest.raises(ValueError, match="do not hold 2 rows of 4"):
            decode_int4(broken)


def test_scales_that_the_product_rounds() -> None:
    weight = ternary((64, 2), 32)
    assert not is_rounded(encode_int4(FC1, weight))
    more: Any = np.full((2, 2), 257 / 512, np.float32)  # 9 bits
    assert is_rounded(encode_int4(FC1, TernaryTensor(weight.trits, more, 32)))
    one: Any = np.full((1, 2), 257 / 512, np.float32)  # one scale a row is float32 everywhere
    assert not is_rounded(encode_int4(FC1, TernaryTensor(weight.trits, one, 64)))
