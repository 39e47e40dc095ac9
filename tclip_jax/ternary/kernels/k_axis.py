"""The input axis as kernels want it: groups and the axis itself padded with zeros to whole tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pad(array: jax.Array, multiple: int, axis: int) -> jax.Array:
    """Zeros at the end of `axis`, up to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])


def padded(group: int, granule: int) -> int:
    """Positions along K from one scale to the next once groups are padded to whole granules."""
    return -(-group // granule) * granule


def spread(array: jax.Array, group: int, granule: int, multiple: int, axis: int) -> jax.Array:
    """Pads every group of `axis` to whole granules, where there is more than one; then the axis to a multiple."""
    axis %= array.ndim
    if group < array.shape[axis] and group % granule:
        array = pad(array, group, axis)
        array = array.reshape(*array.shape[:axis], -1, group, *array.shape[axis + 1 :])
        array = pad(array, granule, axis + 1)
        array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return pad(array, multiple, axis)


def gather(array: jax.Array, length: int, group: int, granule: int) -> jax.Array:
    """What `spread` made of the second-to-last axis, back to its `length`."""
    if group < length and group % granule:
        groups, own = -(-length // group), padded(group, granule)
        array = array[..., : groups * own, :].reshape(*array.shape[:-2], groups, own, array.shape[-1])
        array = array[..., :group, :].reshape(*array.shape[:-3], groups * group, array.shape[-1])
    return array[..., :length, :]
