"""Blocks fit VMEM, fill whole tiles, and waste little of their axis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.ternary.kernels.layout import DEVICES, SMALLEST, block_sizes, vmem


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


def test_float32_blocks_stay_small_enough_to_compile() -> None:
    assert block_sizes(DEVICES["TPU v5 lite"], 1000, 768, 257 * 128, 4, 4) == (128, 256)


def test_refuses_a_k_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"K of 131072 does not fit the 16 MiB"):
        block_sizes(SMALLEST, 8, 131_072, 128, 2, 2)


def test_vmem_is_the_bytes_of_every_buffer() -> None:
    rows, k, columns, activation, output = 416, 768, 640, 1, 2
    twice = {"x": rows * k * activation, "words": k * columns // 4, "product": rows * columns * output}
    once = {"weights": k * columns * activation, "sums": rows * columns * 4}
    assert vmem(rows, k, columns, activation, output) == 2 * sum(twice.values()) + sum(once.values())
    # A float32 x with few rows, where other terms dominate.
    assert vmem(8, 128, 256, 4, 4) == 2 * (8 * 128 * 4 + 128 * 256 // 4 + 8 * 256 * 4) + 128 * 256 * 4 + 8 * 256 * 4


def test_devices_are_the_measured_ones() -> None:
    mib = {kind: device.vmem / 2**20 for kind, device in DEVICES.items()}
    assert mib == {"TPU v4": 16, "TPU v5 lite": 64, "TPU v5": 32, "TPU v6 lite": 64} and SMALLEST.vmem == 16 * 2**20
    assert [kind for kind, device in DEVICES.items() if not device.int8] == ["TPU v4"]
    assert {device.rows for device in DEVICES.values()} == {512}
    assert [device.columns for device in DEVICES.values()] == [1024, 1024, 1024, 2048]
    assert {kind: device.usable / device.vmem for kind, device in DEVICES.items()} == dict.fromkeys(DEVICES, 0.75)


@pytest.mark.parametrize(
    ("kind", "rows", "k", "columns", "size", "blocks"),
    [
        ("TPU v6 lite", 512, 768, 2048, 2, (512, 2048)),  # the largest block
        ("TPU v5 lite", 512, 768, 2048, 2, (512, 1024)),
        ("TPU v5 lite", 257, 768, 2048, 2, (257, 1024)),
        ("TPU v5 lite", 256, 768, 2048, 2, (256, 512)),  # few rows: narrower
        ("TPU v5 lite", 256, 768, 640, 2, (256, 384)),  # two parts of at most 512 in whole tiles of 128
        ("TPU v5 lite", 513, 768, 1152, 2, (288, 640)),  # ceil(513 / 2) = 257 in whole tiles of 32
        ("TPU v5 lite", 512, 768, 2048, 4, (128, 256)),  # float32
        ("TPU v4", 512, 3072, 1024, 2, (512, 512)),  # 98 % of the usable VMEM; the longer side is halved
        ("TPU v4", 512, 4096, 1024, 2, (512, 256)),  # of equal sides the columns are halved
        ("TPU v4", 512, 6144, 1024, 2, (256, 256)),
        ("TPU v4", 512, 16384, 1024, 1, (256, 128)),
        ("TPU v4", 512, 40960, 1024, 1, (32, 128)),  # the smallest block
    ],
)
def test_blocks_are_the_largest_that_fit(
    kind: str, rows: int, k: int, columns: int, size: int, blocks: tuple[int, int]
) -> None:
    result = block_sizes(DEVICES[kind], rows, k, columns, size, max(size, 2))
    assert result == blocks
