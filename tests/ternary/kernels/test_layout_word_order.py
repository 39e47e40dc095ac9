"""Words give back the trits and, shifted and masked, the bits of bf16 and int8 weights."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tclip_jax.ternary.kernels.layout import Order, pack, pack_words, unpack, unpack_words
from tclip_jax.ternary.tensor import TernaryTensor


def trits_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


@pytest.mark.parametrize(
    ("order", "mask", "lane", "factor"),
    [("bf16", 0xC000C000, ml_dtypes.bfloat16, 2), ("int8", 0xC0C0C0C0, np.int8, 64)],
)
def test_a_step_shifted_and_masked_is_a_tile_in_the_order_of_k(
    order: Order, mask: int, lane: type, factor: int
) -> None:
    trits = trits_of(0, 256, 3)
    words = np.asarray(pack_words(jnp.asarray(trits), order)).view(np.uint32)
    assert words.shape == (16, 3)
    steps = {"bf16": 8, "int8": 4}[order]
    for block in range(2):
        for step in range(steps):
            lanes = np.ascontiguousarray(((words[8 * block : 8 * block + 8] << 2 * step) & mask).T).view(lane).T
            start, length = 128 * block + 128 // steps * step, 128 // steps
            np.testing.assert_array_equal(lanes.astype(int), factor * trits[start : start + length])


def test_words_are_the_documented_ones() -> None:
    trits = np.zeros((128, 1), np.int8)
    trits[16 + 2 * 3 + 1] = -1  # bf16: step 1, word 3, upper lane; int8: step 0, word 5, lane 3
    bf16, int8 = (np.asarray(pack_words(jnp.asarray(trits), order))[:, 0].view(np.uint32) for order in ("bf16", "int8"))
    np.testing.assert_array_equal(bf16, [0, 0, 0, 3 << 2 * (8 + 7 - 1), 0, 0, 0, 0])
    np.testing.assert_array_equal(int8, [0, 0, 0, 0, 0, 3 << 2 * (4 * 3 + 3 - 0), 0, 0])


@pytest.mark.parametrize("order", ["bf16", "int8"])
@given(hnp.arrays(np.int8, (2, 256, 3), elements=st.integers(-1, 1)))
def test_words_round_trip(order: Order, trits: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack_words(pack_words(jnp.asarray(trits), order), order), trits)


@pytest.mark.parametrize("order", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("length", "columns", "group"), [(1, 1, 1), (300, 130, 100), (300, 5, 256), (130, 128, 16), (256, 3, 256)]
)
def test_any_weight_round_trips(length: int, columns: int, group: int, order: Order) -> None:
    scale = np.random.default_rng(1).uniform(0.5, 2, (2, -(-length // group), columns)).astype(np.float32)
    for levels in (scale, scale[..., :1]) if length == group else (scale,):
        w = TernaryTensor(jnp.asarray(trits_of(0, 2, length, columns)), jnp.asarray(levels), group)
        packed = pack(w, order, "layout")
        assert (
            packed.layer_shape == (length, columns)
            and packed.data.shape[-1] % 128 == 0
            and packed.data.dtype == jnp.int32
        )
        np.testing.assert_array_equal(unpack(packed, order), np.asarray(w.dequantize()))
    one = TernaryTensor(w.trits[1], w.scale[1], group)
    np.testing.assert_array_equal(pack(one, order, "layout").data, packed.data[1])


@pytest.mark.parametrize("order", ["bf16", "int8"])
@pytest.mark.parametrize("group", [128, 256, 768])
def test_weights_take_exactly_two_bits(group: int, order: Order) -> None:
    w = TernaryTensor(jnp.zeros((768, 256), jnp.int8), jnp.ones((768 // group, 256)), group)
    packed = pack(w, order, "layout")
    assert packed.data.nbytes == 768 * 256 // 4 and packed.scale.nbytes == 4 * 256 * (768 // group)
