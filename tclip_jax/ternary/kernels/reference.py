"""The reference: dequantize and multiply, in plain jnp; what every other implementation is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.ternary.packing import pack_2bit, unpack_2bit
from tclip_jax.ternary.sums import sum_products
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale

NAME = "reference"


def unsupported(**_: Any) -> str | None:
    """None: it runs everywhere."""
    return None


def slower(**_: Any) -> str | None:
    """None: it is what the dispatcher falls back to."""
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Four consecutive k a byte as two's-complement fields, the first lowest: data (…, ceil(K / 4), N) uint8."""
    length, columns = w.shape[-2:]
    return PackedTensor(pack_2bit(jnp.asarray(w.trits), -2), w.scale, (length, columns), w.group, NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    trits = unpack_2bit(jnp.asarray(w.data), w.shape[0], -2)
    return trits.astype(jnp.float32) * expand_scale(w.scale, w.group, w.shape[0], -2).astype(jnp.float32)


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations) -> jax.Array:
    """x · ŵ; with A8, of the activations that `quantize_activations` gives."""
    return multiply(x, unpack(w), activations)


def multiply(x: jax.Array, dense: jax.Array, activations: Activations) -> jax.Array:
    """The product with weights that are dense already."""
    if activations == "A8":
        rounded, level = quantize_activations(x)
        product = jnp.matmul(rounded.astype(dense.dtype), dense, preferred_element_type=jnp.float32)
        return (product * level).astype(x.dtype)
    return sum_products(x, dense.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)


def quantize_activations(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations of each token (row of the last axis) as int8, and float32 levels (…, 1): x ≈ int8 · level.

    level = max|x| / 127 of the token; values are rounded to nearest, ties to even.
    """
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32)
    # Rows of zeros would divide by zero.
    largest = jnp.maximum(largest, 2.0**-100)
    return jnp.round(x.astype(jnp.float32) * (127.0 / largest)).astype(jnp.int8), largest / 127.0
