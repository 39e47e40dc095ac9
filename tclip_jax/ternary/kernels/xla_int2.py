"""Ternary product by XLA on `int2` weights, for TPUs v5e, v5p and v6e, where XLA unpacks them inside the dot.

It is the baseline without a kernel. Compiled ahead of time only: it has not run on a TPU yet. v4 is excluded by its
name, because XLA aborts the process there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale

NAME = "xla_int2"

DEVICE_KINDS = ("TPU v5 lite", "TPU v5", "TPU v6 lite")


def unsupported(*, device_kind: str, **_: Any) -> str | None:
    if device_kind not in DEVICE_KINDS:
        return f"XLA packs int2 on {', '.join(DEVICE_KINDS)}, not on {device_kind}"
    return None


def slower(**_: Any) -> str | None:
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Cast the trits to int2 (…, K, N), in their own order."""
    trits = jnp.asarray(w.trits).astype(jnp.int2)
    return PackedTensor(trits, jnp.asarray(w.scale, jnp.float32), (w.shape[-2], w.shape[-1]), w.group, NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    return w.data.astype(jnp.float32) * expand_scale(w.scale, w.group, w.layer_shape[0], -2)


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations) -> jax.Array:
    """Multiply with weights in the dtype of the activations: x · ŵ; with A8, int32 sums of each group, in float32.

    With A16 activations are rounded to bfloat16.
    """
    if activations != "A8":
        rows = x if activations == "A32" else x.astype(jnp.bfloat16)
        weights = w.data.astype(rows.dtype) * expand_scale(w.scale, w.group, w.layer_shape[0], -2).astype(rows.dtype)
        return jnp.matmul(rows, weights, preferred_element_type=jnp.float32).astype(x.dtype)
    rows, level = quantize_activations(x)
    total = jnp.zeros((x.shape[0], w.layer_shape[1]), jnp.float32)
    for j in range(w.scale.shape[-2]):
        own = slice(j * w.group, (j + 1) * w.group)
        part = jnp.matmul(rows[:, own], w.data[own].astype(jnp.int8), preferred_element_type=jnp.int32)
        total += part.astype(jnp.float32) * w.scale[j]
    return (total * level).astype(x.dtype)
