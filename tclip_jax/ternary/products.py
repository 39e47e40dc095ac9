"""Products of narrow floats whose sums are float32, over the terms of a product and over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    return sum_products(x, narrow, ((x.ndim - 1,), (0,))).astype(x.dtype), (x, narrow)


def _dense_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    rows, columns = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1, gradient.ndim))
    to_x = sum_products(gradient, w, (columns, tuple(range(1, w.ndim)))).astype(x.dtype)
    return to_x, jnp.moveaxis(sum_products(gradient, x, (rows, rows)), -1, 0)


dense_product.defvjp(_dense_forward, _dense_backward)
