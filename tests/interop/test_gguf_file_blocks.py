"""Encoding and decoding of blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tclip_jax.interop.gguf_file import KINDS, Kind, decode_blocks, encode_blocks

BLOCK_BYTES = {"tq1_0": 54, "tq2_0": 66}


def random_blocks(rows: int, blocks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return trits, without all-zero blocks, and scales of eight bits down to the smallest of a quantizer."""
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (rows, blocks * 256), np.int8)
    mantissa, exponent = rng.integers(128, 256, (2, rows, blocks)), rng.integers(-24, 8, (rows, blocks))
    return trits, np.ldexp(mantissa[0], exponent).clip(2.0**-17).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_values_are_those_of_the_gguf_package(kind: Kind) -> None:
    trits, scale = random_blocks(200, 3)
    weights = trits * scale.repeat(256, axis=1)
    number = gguf.GGMLQuantizationType[kind.upper()]
    found = encode_blocks(trits, scale, kind)
    np.testing.assert_array_equal(found, gguf.quants.quantize(weights, number))
    # scale · 0 is +0 in both, so the bits are equal too.
    np.testing.assert_array_equal(gguf.quants.dequantize(found, number).view(np.uint32), weights.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data(), rows=st.integers(1, 2), blocks=st.integers(1, 2))
def test_round_trip(kind: Kind, data: st.DataObject, rows: int, blocks: int) -> None:
    trits = data.draw(arrays.arrays(np.int8, (rows, blocks * 256), elements=st.integers(-1, 1)))
    halves = st.floats(2.0**-24, 65504, width=16)
    scale = data.draw(arrays.arrays(np.float16, (rows, blocks), elements=halves)).astype(np.float32)
    encoded = encode_blocks(trits, scale, kind)
    assert encoded.shape == (rows, blocks * BLOCK_BYTES[kind])
    again = decode_blocks(encoded, kind)
    np.testing.assert_array_equal(again[0], trits)
    np.testing.assert_array_equal(again[1], scale)
    assert [array.dtype for array in again] == [np.int8, np.float32]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_keeps_its_scale(kind: Kind) -> None:
    """gguf's quantizer would store 0 instead."""
    scale = np.ones((1, 2), np.float32)
    trits: np.ndarray = np.repeat(np.array([[0, -1]], np.int8), 256, axis=1)
    again = decode_blocks(encode_blocks(trits, scale, kind), kind)
    np.testing.assert_array_equal(again[0], trits)
    np.testing.assert_array_equal(again[1], scale)


def test_layout_by_hand() -> None:
    """Each position alone changes one byte by the amount in the format's description."""
    for position in range(256):
        trits = np.full((1, 256), -1, np.int8)
        trits[0, position] = 1
        one, two = (encode_blocks(trits, np.ones((1, 1)), kind)[0] for kind in KINDS)
        if position < 160:
            byte, n = position % 32, position // 32
        elif position < 240:
            byte, n = 32 + (position - 160) % 16, (position - 160) // 16
        else:
            byte, n = 48 + (position - 240) % 4, (position - 240) // 4
        expected = np.zeros(52, np.uint8)
        expected[byte] = -(-2 * 3 ** (4 - n) * 256 // 243)
        np.testing.assert_array_equal(one, [*expected, 0x00, 0x3C])
        expected = np.zeros(64, np.uint8)
        expected[position // 128 * 32 + position % 32] = 2 << position % 128 // 32 * 2
        np.testing.assert_array_equal(two, [*expected, 0x00, 0x3C])


def test_exactly_the_codes_of_trits_are_read() -> None:
    good = encode_blocks(np.zeros((1, 256), np.int8), np.ones((1, 1)), "tq1_0")
    for place, codes in ((0, 243), (47, 243), (48, 81), (51, 81)):
        read = 0
        for byte in range(256):
            block = good.copy()
            block[0, place] = byte
            try:
                trits, scale = decode_blocks(block, "tq1_0")
            except ValueError:
                continue
            read += 1
            np.testing.assert_array_equal(encode_blocks(trits, scale, "tq1_0"), block)
        assert read == codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("half", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-1, "negative"), (-0.0, "negative"), (0, "0 for nonzero trits")],
)
def test_a_scale_that_no_weights_have_is_refused(half: float, message: str, kind: Kind) -> None:
    block = encode_blocks(np.ones((1, 256), np.int8), np.ones((1, 1)), kind)
    block[0, -2:] = np.array([half], "<f2").view(np.uint8)
    with pytest.raises(ValueError, match=message):
        decode_blocks(block, kind)


def test_a_two_bit_code_of_three_is_refused() -> None:
    block = encode_blocks(np.ones((1, 256), np.int8), np.ones((1, 1)), "tq2_0")
    block[0, 5] |= 3
    with pytest.raises(ValueError, match="a byte of a tq2_0 block encodes no trits"):
        decode_blocks(block, "tq2_0")


@pytest.mark.parametrize(
    ("trit", "scale", "message"),
    [
        (2, 1.0, "found 2 to 2"),
        (1, 0.1, "scale 0.100000001 is not exact in float16"),
        (1, 1e6, "scale 1000000 is not exact in float16"),
        (1, np.nan, "scale nan is not exact in float16"),
        (1, -1.0, "a scale is negative"),
        (1, 0.0, "a scale is 0 for nonzero trits"),
    ],
)
def test_what_a_block_cannot_hold_is_refused(trit: int, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_blocks(np.full((2, 256), trit, np.int8), np.full((2, 1), scale, np.float32), "tq1_0")


@pytest.mark.parametrize("shapes", [((2, 255), (2, 1)), ((2, 512), (2, 1)), ((2, 256), (1, 1))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="a scale is for 256 weights of a row"):
        encode_blocks(np.zeros(shapes[0], np.int8), np.zeros(shapes[1]), "tq2_0")
