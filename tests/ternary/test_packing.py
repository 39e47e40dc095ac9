"""Trits survive packing, and bytes that hold no trits are refused."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tclip_jax.ternary.packing import pack_2bit, pack_base3, unpack_2bit, unpack_base3

trit_arrays = hnp.arrays(np.int8, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0), elements=st.integers(-1, 1))


@given(trit_arrays)
def test_base3_round_trip(trits: np.ndarray) -> None:
    packed = pack_base3(trits)
    assert packed.dtype == np.uint8 and packed.size == -(-trits.size // 5) and (packed <= 242).all()
    np.testing.assert_array_equal(unpack_base3(packed, trits.shape), trits)


@settings(max_examples=30)  # each shape compiles
@given(st.data())
def test_2bit_round_trip_along_any_axis_in_numpy_and_jax(data: st.DataObject) -> None:
    trits = data.draw(trit_arrays.filter(lambda trits: trits.ndim > 0))
    axis = data.draw(st.integers(-trits.ndim, trits.ndim - 1))
    packed, length = pack_2bit(trits, axis), trits.shape[axis]
    expected = [-(-size // 4) if i == axis % trits.ndim else size for i, size in enumerate(trits.shape)]
    assert packed.dtype == np.uint8 and packed.shape == tuple(expected)
    np.testing.assert_array_equal(unpack_2bit(packed, length, axis), trits)
    on_device = pack_2bit(jnp.asarray(trits), axis)
    assert isinstance(on_device, jax.Array)
    np.testing.assert_array_equal(on_device, packed)
    np.testing.assert_array_equal(unpack_2bit(on_device, length, axis), trits)


def test_bytes_are_the_documented_ones() -> None:
    trits = np.array([1, 0, -1, 1, 1, -1], np.int8)
    np.testing.assert_array_equal(pack_base3(trits), [2 + 3 + 0 + 2 * 27 + 2 * 81, 0 + 3 + 9 + 27 + 81])
    np.testing.assert_array_equal(pack_2bit(trits), [0b01_11_00_01, 0b00_00_11_01])


@pytest.mark.parametrize("pack", [pack_base3, pack_2bit])
def test_integers_of_any_kind_are_trits_and_nothing_else_is(pack: Callable[[np.ndarray], np.ndarray]) -> None:
    trits = np.array([[1, 0, -1], [0, 1, 1]])
    for dtype in (np.int8, np.int16, np.int64):
        np.testing.assert_array_equal(pack(trits.astype(dtype)), pack(trits.astype(np.int8)))
    np.testing.assert_array_equal(pack(trits.T.astype(np.int8)), pack(np.ascontiguousarray(trits.T, np.int8)))
    for invalid in (trits * 0.7, trits == 1, np.array([np.nan, 1.0]), trits.astype(np.complex64)):
        with pytest.raises(ValueError, match=rf"^trits are integers −1, 0 and \+1, not {invalid.dtype}$"):
            pack(invalid)
    for outside in (256, 2, -257, 2**40):  # a cast to int8 turns 256 into 0
        with pytest.raises(ValueError, match=r"^trits are −1, 0 and"):
            pack(np.array([0, outside]))


def test_refuses_what_is_no_trit() -> None:
    with pytest.raises(ValueError, match="found 0 to 2"):
        pack_base3(np.array([0, 2], np.int8))
    with pytest.raises(ValueError, match="byte 243"):
        unpack_base3(np.array([243], np.uint8), (5,))
    with pytest.raises(ValueError, match="−2"):
        unpack_2bit(np.array([0b10], np.uint8), 1)
    with pytest.raises(ValueError, match="2 bytes do not hold 4 trits: expected 1"):
        unpack_2bit(np.zeros(2, np.uint8), 4)
    with pytest.raises(ValueError, match=r"2 packed bytes .*expected 1"):
        unpack_base3(np.zeros(2, np.uint8), (5,))
