"""Padding of groups to whole tiles, against NumPy: it adds zeros, and `gather` removes them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.ternary.kernels.layout import gather, pad, padded, spread


def numpy_spread(x: np.ndarray, group: int, granule: int, multiple: int) -> np.ndarray:
    """`spread` of a vector: pad each of several groups to whole granules, then the vector to the multiple."""
    groups = [x[start : start + group] for start in range(0, len(x), group)]
    if len(groups) > 1:
        size = -(-group // granule) * granule
        # A short last group is padded only if the others are.
        whole = [np.pad(each, (0, size - len(each))) for each in groups] if size != group else groups
        x = np.concatenate(whole)
    return np.pad(x, (0, -len(x) % multiple))


@pytest.mark.parametrize(
    ("length", "group", "granule", "multiple", "expected"),
    [
        (6, 3, 4, 8, 8),  # two groups of 3, each padded to 4
        (7, 3, 4, 8, 16),  # three groups padded to 12, then to 16
        (7, 4, 4, 8, 8),  # groups are whole granules: the last group stays short
        (20, 8, 4, 1, 20),
        (5, 5, 4, 8, 8),  # one group: only the axis is padded
        (5, 9, 4, 1, 5),
        (8, 2, 3, 6, 12),
    ],
)
@pytest.mark.parametrize("axis", [-1, -2, 0])
def test_spread_pads_groups_and_gather_undoes_it(
    length: int, group: int, granule: int, multiple: int, expected: int, axis: int
) -> None:
    x = np.random.default_rng(0).integers(1, 9, (length, length), np.int8)
    reference = np.apply_along_axis(numpy_spread, axis, x, group, granule, multiple)
    assert reference.shape[axis] == expected
    result = spread(jnp.asarray(x), group, granule, multiple, axis)
    np.testing.assert_array_equal(result, reference)
    if axis == -2:
        np.testing.assert_array_equal(gather(result, length, group, granule), x)
        np.testing.assert_array_equal(gather(jnp.stack([result, 2 * result]), length, group, granule), [x, 2 * x])


def test_padding_is_at_the_end_of_one_axis() -> None:
    x = jnp.arange(1, 13).reshape(2, 3, 2)
    np.testing.assert_array_equal(pad(x, 4, -2), np.pad(x, [(0, 0), (0, 1), (0, 0)]))
    np.testing.assert_array_equal(pad(x, 3, 0), np.pad(x, [(0, 1), (0, 0), (0, 0)]))
    np.testing.assert_array_equal(pad(x, 3, 1), x)
    assert [padded(group, 16) for group in (1, 15, 16, 17, 32)] == [16, 16, 16, 32, 32]
