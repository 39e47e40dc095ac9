"""Embedding tables that are packed by rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.ternary import TernaryTensor, gather_rows, pack_rows


@settings(max_examples=10)
@given(width=st.integers(1, 40), group=st.sampled_from([1, 7, 16, 64]), shared=st.booleans(), seed=st.integers(0, 9))
def test_gathered_rows_are_scale_times_trit(width: int, group: int, shared: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trits = rng.integers(-1, 2, (11, width), dtype=np.int8)
    scale = rng.random((1, 1) if shared else (11, -(-width // min(group, width))), np.float32)
    table = pack_rows(TernaryTensor(trits, scale, min(group, width), -1))  # type: ignore[arg-type]
    tokens = rng.integers(0, 11, (2, 3))
    expected = trits * (scale if shared else np.repeat(scale, min(group, width), 1)[:, :width])
    np.testing.assert_array_equal(jax.jit(gather_rows)(table, tokens), expected[tokens])


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, jnp.bfloat16), (1.001, jnp.float32)])
def test_a_table_takes_two_bits_a_weight_and_scales_are_narrow_where_that_is_exact(factor: float, dtype: type) -> None:
    table = TernaryTensor(np.ones((6, 32), np.int8), np.full((6, 2), 0.5 * factor, np.float32), 16, -1)  # type: ignore[arg-type]
    packed = pack_rows(table)
    assert (packed.data.nbytes, packed.scale.dtype) == (6 * 32 / 4, dtype)
    np.testing.assert_array_equal(gather_rows(packed, jnp.arange(6)), table.dequantize())
