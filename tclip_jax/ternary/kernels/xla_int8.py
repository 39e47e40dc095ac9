"""Ternary product by XLA's int8 dot on CPUs, for A8 where the native library is not built.

Trits are int8 in memory, a quarter of float32. Unpacking 2-bit weights in XLA would take the time that the dot saves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels.reference import multiply, quantize_activations
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale

NAME = "xla_int8"

_FEWEST_ROWS = 32  # below this, XLA's int8 dot is slower than its float32 dot
_MOST_ROWS = 1024  # above this, the int32 sums exceed the cache and the int8 dot is no faster


def unsupported(*, platform: str, **_: Any) -> str | None:
    return None if platform == "cpu" else "it is for CPUs only: other platforms have kernels with packed weights"


def slower(*, rows: int | None, activations: str, **_: Any) -> str | None:
    if activations != "A8":
        return "its dot takes int8 activations (A8) only"
    if rows is not None and not _FEWEST_ROWS <= rows <= _MOST_ROWS:
        return f"M is not within {_FEWEST_ROWS} to {_MOST_ROWS}"
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Keep the int8 trits unchanged."""
    return PackedTensor(w.trits, w.scale, (w.shape[-2], w.shape[-1]), w.group, NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    return w.data.astype(jnp.float32) * expand_scale(w.scale, w.group, w.layer_shape[0], -2)


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations) -> jax.Array:
    """Multiply with int32 sums of each group, scaled in float32; floats for few rows or other activations."""
    if activations != "A8" or x.shape[0] < _FEWEST_ROWS:
        return multiply(x, unpack(w), activations)
    rounded, level = quantize_activations(x)
    total = jnp.zeros((x.shape[0], w.layer_shape[1]), jnp.float32)
    for j in range(w.scale.shape[-2]):
        own = slice(j * w.group, (j + 1) * w.group)
        part = jnp.matmul(rounded[:, own], w.data[own], preferred_element_type=jnp.int32)
        total += part.astype(jnp.float32) * w.scale[j]
    return (total * level).astype(x.dtype)
