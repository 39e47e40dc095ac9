"""Sums and quotients whose bits do not depend on where they are computed: every order of additions is written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def halving_sum(x: jax.Array, axis: int) -> jax.Array:
    """Sums along `axis` in a fixed order, keeping the axis: pad to a power of two, then x[:n/2] + x[n/2:] down to 1."""
    axis %= x.ndim
    length = 1 << max(x.shape[axis] - 1, 0).bit_length()
    x = _pad_end(x, length - x.shape[axis], axis)
    while length > 1:
        length //= 2
        x = jax.lax.slice_in_dim(x, 0, length, axis=axis) + jax.lax.slice_in_dim(x, length, 2 * length, axis=axis)
    return x


def prefix_sums(x: jax.Array, axis: int) -> jax.Array:
    """Sums of the first 1, 2, … entries along `axis` in a fixed order: each doubling adds the array shifted by it."""
    axis, length, shift = axis % x.ndim, x.shape[axis], 1
    while shift < length:
        kept = jax.lax.slice_in_dim(x, 0, length - shift, axis=axis)
        x = x + jnp.pad(kept, [(shift if i == axis else 0, 0) for i in range(x.ndim)])
        shift *= 2
    return x


def split_groups(x: jax.Array, group: int, axis: int) -> jax.Array:
    """(…, K, …) to (…, ceil(K / group), group, …), zeros filling the last group; `axis` is counted from the end."""
    axis %= x.ndim
    count = -(-x.shape[axis] // group)
    x = _pad_end(x, count * group - x.shape[axis], axis)
    return x.reshape(*x.shape[:axis], count, group, *x.shape[axis + 1 :])


def quotient(total: jax.Array, count: jax.Array) -> jax.Array:
    """The largest float32 whose product with `count` is at most `total`: not every machine rounds a division alike.

    Both are float32, `total` not negative and `count` at least 1; a division may be wrong by two units in the last
    place.
    """
    near = jax.lax.bitcast_convert_type(total / count, jnp.int32)
    best = jnp.zeros_like(total)
    for units in range(-2, 3):
        candidate = jax.lax.bitcast_convert_type(jnp.maximum(near + units, 0), jnp.float32)
        best = jnp.where(candidate * count <= total, candidate, best)
    return best


def _pad_end(x: jax.Array, missing: int, axis: int) -> jax.Array:
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
