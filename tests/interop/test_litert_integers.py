"""INT4 and INT8 matrices: integers and scales to the bit, and what they cannot hold. Needs no LiteRT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.interop.litert_integers import BLOCK, Integers, decode_integers, encode_integers, is_rounded
from tclip_jax.ternary import TernaryTensor
from tclip_jax.ternary.uniform import pack_uniform
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
            encode_integers(path, weight)
        return
    matrix = encode_integers(path, weight)
    rows, columns = matrix.shape
    assert matrix.codes.nbytes == rows * columns / 2 and rows == outputs and 0 <= columns - length < BLOCK
    assert (matrix.block is None) == (length == group) and (matrix.block or BLOCK) % BLOCK == 0
    trits, scale = decode_integers(matrix)
    assert not trits[:, length:].any()
    trits, scale = trits[:, :length], scale[:, :length]
    np.testing.assert_array_equal(trits.T if axis == -2 else trits, weight.trits)
    np.testing.assert_array_equal((trits * scale).T if axis == -2 else trits * scale, weight.dequantize())


@pytest.mark.parametrize(
    ("length", "group", "columns", "block"),
    [(768, 256, 768, 256), (1408, 256, 1408, 128), (4304, 256, 4320, 32), (640, 96, 640, 32), (97, 97, 98, None)],
)
def test_the_largest_block_that_fits(length: int, group: int, columns: int, block: int | None) -> None:
    matrix = encode_integers(FC1, ternary((length, 3), group))
    assert matrix.shape == (3, columns) and matrix.block == block


def test_the_first_code_is_in_the_lowest_bits() -> None:
    trits: Any = np.array([[1], [-1], [0], [1]], np.int8)
    scale: Any = np.full((1, 1), 0.5, np.float32)
    assert encode_integers(FC1, TernaryTensor(trits, scale, 4)).codes.tolist() == [0xF1, 0x10]


def test_a_scale_of_zero_is_stored_as_one() -> None:
    weight = ternary((64, 2), 32)
    trits, scale = np.array(weight.trits), np.array(weight.scale)
    trits[:32, 1], scale[0, 1] = 0, 0
    matrix = encode_integers(FC1, TernaryTensor(trits, scale, 32))  # type: ignore[arg-type]
    assert matrix.scale[1, 0] == 1
    found, scales = decode_integers(matrix)
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
        encode_integers(FC1, TernaryTensor(weight.trits, scales, group))


def test_what_is_no_trit_is_refused() -> None:
    weight = ternary((64, 2), 32)
    trits: Any = np.full((64, 2), 2, np.int8)
    with pytest.raises(ValueError, match=r"trits are −1, 0 and \+1: found 2 to 2"):
        encode_integers(FC1, TernaryTensor(trits, weight.scale, 32))
    codes, scale = np.full(4, 0x81, np.uint8), np.ones(2, np.float32)
    with pytest.raises(ValueError, match="integers of 4 bits are −7 to 7: found -8 to 1"):
        decode_integers(Integers(codes, (2, 4), scale))
    for wrong in (codes[:3], np.zeros((2, 3), np.float16), np.zeros((2, 0), np.float16)):
        broken = Integers(wrong, (2, 4), scale) if wrong.dtype == np.uint8 else Integers(codes, (2, 4), wrong)
        with pytest.raises(ValueError, match="do not hold 2 rows of 4"):
            decode_integers(broken)


@settings(max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    length=st.integers(1, 300),
    group=st.sampled_from([32, 96, 256, 1000]),
    axis=st.sampled_from([-2, -1]),
    seed=st.integers(0, 99),
)
def test_integers_of_4_and_8_bits(bits: int, length: int, group: int, axis: int, seed: int) -> None:
    rng, group, largest = np.random.default_rng(seed), min(group, length), 2 ** (bits - 1) - 1
    integers = rng.integers(-largest, largest + 1, (3, length)).astype(np.int8)
    integers[:, 0] = largest  # no group of zeros, whose scale would be 0
    scale = rng.integers(1, 256, (3, -(-length // group))).astype(np.float32) / 1024
    turned = [integers.T, scale.T] if axis == -2 else [integers, scale]
    weight, path = pack_uniform(*turned, bits, group, axis), FC1 if axis == -2 else TABLE
    if bits == 8 and scale.shape[1] > 1:
        with pytest.raises(
            ValueError, match=f"{path} has groups of {group} .*: LiteRT has INT8 .* one scale a channel"
        ):
            encode_integers(path, weight)
        return
    matrix = encode_integers(path, weight)
    assert matrix.bits == bits and matrix.codes.nbytes == matrix.shape[0] * matrix.shape[1] * bits // 8
    found, scales = decode_integers(matrix)
    assert not found[:, length:].any()
    np.testing.assert_array_equal(found[:, :length], integers)
    np.testing.assert_array_equal(scales[:, :length], scale.repeat(group, 1)[:, :length])


def test_integers_beyond_their_bits_are_refused() -> None:
    for bits, lowest in ((4, -8), (8, -128)):
        weight = pack_uniform(np.full((4, 1), lowest, np.int8), np.ones((1, 1), np.float32), bits, 4, -2)
        with pytest.raises(ValueError, match=f"^{FC1}: integers of {bits} bits .* found {lowest} to {lowest}"):
            encode_integers(FC1, weight)


def test_scales_that_the_product_rounds() -> None:
    weight = ternary((64, 2), 32)
    assert not is_rounded(encode_integers(FC1, weight))
    more: Any = np.full((2, 2), 257 / 512, np.float32)  # 9 bits
    assert is_rounded(encode_integers(FC1, TernaryTensor(weight.trits, more, 32)))
    one: Any = np.full((1, 2), 257 / 512, np.float32)  # one scale a row is float32 everywhere
    assert not is_rounded(encode_integers(FC1, TernaryTensor(weight.trits, one, 64)))
