"""The reference implementation, dequantize and multiply in jnp, against which all others are tested."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from tclip_jax.ternary.packing import pack_2bit, unpack_2bit
from tclip_jax.ternary.sums import sum_products
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale, traced_device

NAME = "reference"


def unsupported(**_: Any) -> str | None:
    """None: it runs on every platform."""
    return None


def slower(**_: Any) -> str | None:
    """None: it is the dispatcher's fallback."""
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Pack four consecutive k into a byte with `pack_2bit`: data uint8 (…, ceil(K / 4), N)."""
    length, columns = w.shape[-2:]
    return PackedTensor(pack_2bit(jnp.asarray(w.trits), -2), w.scale, (length, columns), w.group, NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    trits = unpack_2bit(jnp.asarray(w.data), w.layer_shape[0], -2)
    return trits.astype(jnp.float32) * expand_scale(w.scale, w.group, w.layer_shape[0], -2).astype(jnp.float32)


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations) -> jax.Array:
    """Multiply: x · ŵ; with A16 and A8, `x` is rounded first."""
    return multiply(x, unpack(w), activations)


def multiply(x: jax.Array, dense: jax.Array, activations: Activations) -> jax.Array:
    """Multiply by dense weights; A16 is int16 on CPUs and bfloat16 elsewhere."""
    if activations == "A16" and traced_device()[1] != "cpu":
        narrow = x.astype(jnp.bfloat16)
        return sum_products(narrow, dense.astype(narrow.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)
    if activations == "A16":
        # bfloat16 holds no integers of 16 bits.
        rounded, level = quantize_activations(x, 16)
        return (
            sum_products(rounded.astype(jnp.float32), dense.astype(jnp.float32), ((x.ndim - 1,), (0,))) * level
        ).astype(x.dtype)
    if activations == "A8":
        rounded, level = quantize_activations(x)
        product = jnp.matmul(rounded.astype(dense.dtype), dense, preferred_element_type=jnp.float32)
        return (product * level).astype(x.dtype)
    return sum_products(x, dense.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)


def quantize_activations(x: jax.Array, bits: Literal[8, 16] = 8) -> tuple[jax.Array, jax.Array]:
    """Round the activations of each token (row of the last axis) to integers: x ≈ integer · level.

    Values are rounded to nearest, ties to even.

    Args:
      x: floats (..., K).
      bits: bits of the integers.

    Returns:
      int8 or int16 (..., K), and levels max|x| / 127 or / 32767, float32 (..., 1).
    """
    most = 2.0 ** (bits - 1) - 1
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    # Avoids a division by zero for rows of zeros.
    largest = jnp.maximum(largest, 2.0**-100)
    return jnp.round(x.astype(jnp.float32) * (most / largest)).astype(f"int{bits}"), largest / most
