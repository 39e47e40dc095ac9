"""Sums whose bits do not depend on where they are computed, and products of narrow floats with float32 sums."""

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


Axes = tuple[int, ...]


def sum_products(a: jax.Array, b: jax.Array, axes: tuple[Axes, Axes]) -> jax.Array:
    """`jnp.tensordot(a, b, axes)` of arrays of one float dtype, float32: what devices add up is not rounded before."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

    if a.dtype == jnp.float32:
        return product(a, b)
    # XLA on CPUs has no product of bfloat16 that gives float32, and computes others in float32 anyway.
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32)), default=product
    )


@jax.custom_vjp
def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · w of (..., K) and a float32 w (K, ...) that is rounded to the dtype of `x`, which is that of the result.

    Every sum is float32, and so is the gradient of `w`: it is one over all tokens, of all devices.
    """
    return _dense_forward(x, w)[0]


def _dense_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    narrow = w.astype(x.dtype)
    return _rounded(sum_products(x, narrow, ((x.ndim - 1,), (0,))), x.dtype), (x, narrow)


def _dense_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    to_x = _rounded(sum_products(gradient, w, (columns, tuple(range(1, w.ndim)))), x.dtype)
    return to_x, jnp.moveaxis(sum_products(gradient, x, (rows, rows)), -1, 0)


dense_product.defvjp(_dense_forward, _dense_backward)


def _rounded(total: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A float32 product in `dtype`. Where devices share it, each part would else be rounded before they are added."""
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        # XLA computes in bfloat16 what is only read as bfloat16, an all-reduce too; this reads float32.
        kept = jnp.finfo(dtype)
        total = jax.lax.reduce_precision(total, kept.nexp, kept.nmant)
    return total.astype(dtype)
