"""Sums with a fixed order, bit-identical on every backend, and float32 sums of products of narrow floats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def halving_sum(x: jax.Array, axis: int) -> jax.Array:
    """Sum along `axis` in a fixed order, keeping the axis.

    The axis is padded to a power of two; then x[: n/2] + x[n/2 :] is repeated until one entry remains.
    """
    axis %= x.ndim
    length = 1 << max(x.shape[axis] - 1, 0).bit_length()
    x = _pad_end(x, length - x.shape[axis], axis)
    while length > 1:
        length //= 2
        x = jax.lax.slice_in_dim(x, 0, length, axis=axis) + jax.lax.slice_in_dim(x, length, 2 * length, axis=axis)
    return x


def prefix_sums(x: jax.Array, axis: int) -> jax.Array:
    """Cumulative sums along `axis` in a fixed order: add the array shifted by 1, 2, 4, … entries."""
    axis, length, shift = axis % x.ndim, x.shape[axis], 1
    while shift < length:
        kept = jax.lax.slice_in_dim(x, 0, length - shift, axis=axis)
        x = x + jnp.pad(kept, [(shift if i == axis else 0, 0) for i in range(x.ndim)])
        shift *= 2
    return x


def split_groups(x: jax.Array, group: int, axis: int) -> jax.Array:
    """Split `axis`: (…, K, …) to (…, ceil(K / group), group, …); zeros fill the last group."""
    axis %= x.ndim
    count = -(-x.shape[axis] // group)
    x = _pad_end(x, count * group - x.shape[axis], axis)
    return x.reshape(*x.shape[:axis], count, group, *x.shape[axis + 1 :])


def each_group(x: jax.Array, group: int) -> list[jax.Array]:
    """Return the groups (…, group) of the last axis; zeros fill the last group."""
    count = -(-x.shape[-1] // group)
    return jnp.split(_pad_end(x, count * group - x.shape[-1], x.ndim - 1), count, axis=-1)


def quotient(total: jax.Array, count: jax.Array) -> jax.Array:
    """The largest float32 whose product with `count` is at most `total`.

    It replaces a division, whose rounding differs between machines by up to two units in the last place.

    Args:
      total: float32, at least 0.
      count: float32, at least 1.

    Returns:
      float32 in the shape of `total`.
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


def sum_products(
    a: jax.Array, b: jax.Array, axes: tuple[Axes, Axes], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """`jnp.tensordot(a, b, axes)` of two arrays of one float dtype, in `dtype`, in which devices add their sums.

    In float32 these are unrounded. A narrower `dtype` must be that of the arrays; each device rounds its float32 sum.
    On CPUs the sum of all devices is rounded instead.
    """

    def product(a: jax.Array, b: jax.Array, dtype: jax.typing.DTypeLike = dtype) -> jax.Array:
        return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)

    if a.dtype == jnp.float32:
        return product(a, b)

    def on_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
        # XLA for CPUs has no bfloat16 product with a float32 result; it multiplies bfloat16 in float32 anyway.
        total = product(a.astype(jnp.float32), b.astype(jnp.float32), jnp.float32)
        return total if dtype == jnp.float32 else _narrowed(total, dtype).astype(dtype)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_product(x: jax.Array, w: jax.Array, gradient_dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Multiply x (..., K) by a float32 weight (K, ...) that is rounded to the dtype of `x`; the result has that dtype.

    All sums are float32. The gradient of `w` is a sum over all tokens of all devices: each device adds its own tokens
    in float32, and the devices add their sums in `gradient_dtype`, float32 or the dtype of `x`.
    """
    return _dense_forward(x, w, gradient_dtype)[0]


def _dense_forward(
    x: jax.Array, w: jax.Array, gradient_dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    narrow = w.astype(x.dtype)
    return _rounded(sum_products(x, narrow, ((x.ndim - 1,), (0,))), x.dtype), (x, narrow)


def _dense_backward(
    gradient_dtype: jax.typing.DTypeLike, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    to_x = _rounded(sum_products(gradient, w, (columns, tuple(range(1, w.ndim)))), x.dtype)
    to_w = sum_products(gradient, x, (rows, rows), gradient_dtype).astype(jnp.float32)
    return to_x, jnp.moveaxis(to_w, -1, 0)


dense_product.defvjp(_dense_forward, _dense_backward)


def _rounded(total: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A float32 product in `dtype`, rounded after tensor-parallel devices have added their parts of it."""
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        # XLA would narrow a value whose only use is a cast to bfloat16, even before an all-reduce. This use is float32.
        total = _narrowed(total, dtype)
    return total.astype(dtype)


def _narrowed(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Round float32 to the values of `dtype`; XLA may drop a cast that is followed by one back."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kept.nexp, kept.nmant)
