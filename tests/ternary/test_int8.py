"""Int8 weights and products against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.ternary.int8 import int8_product, round_matrix
from tclip_jax.ternary.kernels.reference import quantize_activations


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([(1, 1, 1), (1, 40, 9), (5, 7, 2), (3, 33, 1)]))  # each shape is compiled
def test_products_are_those_of_rounded_factors(seed: int, shape: tuple[int, int, int]) -> None:
    rng, (rows, inputs, outputs) = np.random.default_rng(seed), shape
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, rows, inputs), (inputs, outputs)))
    matrix = round_matrix(w)
    scale = np.asarray(matrix.scale[0])
    np.testing.assert_allclose(scale, np.abs(w).max(0) / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(matrix.int8).max(0), np.full(outputs, 127))
    assert np.abs(np.asarray(matrix.int8) - w / np.float64(scale)).max() < 0.5 + 1e-4
    level = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    rounded = np.asarray(quantize_activations(jnp.asarray(x))[0], np.float64)
    assert np.abs(rounded - x / level).max() < 0.5 + 1e-4
    expected = (rounded @ np.asarray(matrix.int8, np.float64)) * scale * level
    np.testing.assert_allclose(int8_product(x, matrix), expected, rtol=1e-5, atol=1e-6)


def test_the_error_is_half_a_step_of_each_factor() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 512)).astype(np.float32), rng.standard_normal((512, 64)).astype(np.float32)
    error = np.asarray(int8_product(x, round_matrix(w)), np.float64) - np.float64(x) @ np.float64(w)
    step = np.sqrt((np.abs(x).max(-1) ** 2).mean() / 127**2 + (np.abs(w).max(0) ** 2).mean() / 127**2)
    assert np.isclose(error.std(), step * np.sqrt(512 / 12), rtol=0.1)


def test_layers_dtypes_zeros_and_bad_numbers() -> None:
    w = np.stack([np.zeros((6, 3)), np.ones((6, 3))]).astype(np.float32)
    stacked = round_matrix(w)
    assert stacked.int8.shape == (2, 6, 3) and stacked.scale.shape == (2, 1, 3)
    zeros, ones = (jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2))
    x = jnp.asarray([[1.0] * 6, [0.0] * 6, [np.nan] * 6, [np.inf] * 6], jnp.bfloat16)
    assert int8_product(x, ones).dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(int8_product(x[:2], ones)), [[6] * 3, [0] * 3])
    np.testing.assert_array_equal(np.float32(int8_product(x[:2], zeros)), np.zeros((2, 3)))
    assert not np.isfinite(np.float32(int8_product(x[2:], ones))).any()


@pytest.mark.parametrize("shape", [(6, 3), (4, 6, 3)])
def test_it_is_jitted_and_scanned(shape: tuple[int, ...]) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = jnp.ones((2, 6))
    if len(shape) == 2:
        np.testing.assert_array_equal(jax.jit(int8_product)(x, round_matrix(w)), int8_product(x, round_matrix(w)))
        return
    _, scanned = jax.lax.scan(lambda _, each: (None, int8_product(x, each)), None, round_matrix(w))
    np.testing.assert_allclose(scanned, [int8_product(x, round_matrix(each)) for each in w], rtol=1e-6)
