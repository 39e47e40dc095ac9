"""Blocks fit VMEM, fill whole tiles, and waste little of their axis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.ternary.kernels.block_sizes import DEVICES, SMALLEST, block_sizes, vmem


@given(
    st.sampled_from([*DEVICES.values(), SMALLEST]),
    st.integers(1, 60_000),
    st.integers(1, 64).map(lambda tiles: 128 * tiles),
    st.integers(1, 40).map(lambda tiles: 128 * tiles),
    st.sampled_from([1, 2, 4]),
)
def test_blocks_fit_and_are_whole_tiles(device, rows: int, k: int, columns: int, size: int) -> None:
    m, n = block_sizes(device, rows, k, columns, size, max(size, 2))
    assert vmem(m, k, n, size, max(size, 2)) < device.vmem
    assert m == rows or m % 32 == 0
    assert n % 128 == 0 and m <= device.rows and n <= device.columns


def test_the_last_block_is_nearly_full() -> None:
    m, n = block_sizes(DEVICES["TPU v5 lite"], 1576, 768, 2304, 2, 2)
    assert (m, n) == (416, 768)  # 4 · 416 = 1664, where blocks of 512 would take 2048


def test_refuses_a_k_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"K of 131072 does not fit the 16 MiB"):
        block_sizes(SMALLEST, 8, 131_072, 128, 2, 2)
