"""Dense int8 weights with a scale for each output channel, for a model that only runs forward, such as a teacher."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels.reference import quantize_activations


@functools.partial(jax.tree_util.register_dataclass, data_fields=("int8", "scale"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """A weight ŵ = scale · integer; a pytree.

    Attributes:
      int8: integers −127 … 127, int8 (..., K, N). Leading axes are stacked layers.
      scale: float32 (..., 1, N).
    """

    int8: jax.Array
    scale: jax.Array


def round_matrix(w: jax.Array) -> Int8Matrix:
    """Round a weight (..., K, N) to nearest, ties to even, with the scale max|w| / 127 of each output channel."""
    w = jnp.asarray(w, jnp.float32)
    # Avoids a division by zero for columns of zeros.
    scale = jnp.maximum(jnp.max(jnp.abs(w), axis=-2, keepdims=True), 2.0**-100) / 127
    return Int8Matrix(jnp.round(w / scale).astype(jnp.int8), scale)


def int8_product(x: jax.Array, w: Int8Matrix) -> jax.Array:
    """Multiply activations, rounded to int8 with a scale for each token, by an int8 weight; sums are int32.

    Args:
      x: floats (..., K). A token with NaN or infinity gives NaN.
      w: a weight (K, N) of one layer; or (K, parts, N), with scales (1, parts, N).

    Returns:
      (..., N) or (..., parts, N) in the dtype of `x`. It has no gradient.
    """
    rounded, level = quantize_activations(x)
    total = jax.lax.dot_general(rounded, w.int8, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    level = level.reshape(*x.shape[:-1], *(1,) * (w.int8.ndim - 1))
    # In this order a token whose largest magnitude is NaN or infinite stays so.
    return (total.astype(jnp.float32) * w.scale[0] * level).astype(x.dtype)
