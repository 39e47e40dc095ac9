"""Ternary product on TPUs from v4 with float activations: 2 bits per weight in HBM, bf16 weights in VMEM.

It is compiled ahead of time for v4, v5e, v5p and v6e (`benchmarks/tpu_static.py`) and tested in Pallas' interpreter. It
has not run on a TPU yet.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels import layout
from tclip_jax.ternary.kernels.layout import DEVICES, SMALLEST, Order, vmem
from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.kernels.tpu_dot import tpu_dot
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, traced_device

NAME = "mosaic_tpu"


def unsupported(*, device_kind: str, platform: str, shape: tuple[int, int], dtype: Any, **_: Any) -> str | None:
    if platform != "tpu":
        return f"a TPU kernel does not run on platform {platform}"
    if device_kind not in DEVICES:
        return f"it is compiled for {', '.join(DEVICES)}, not for {device_kind}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"activations are bfloat16 or float32, not {dtype}"
    if vmem(32, shape[0], 128, dtype.itemsize, dtype.itemsize) > DEVICES[device_kind].usable:
        return f"K of {shape[0]} does not fit VMEM"
    return None


def slower(*, dtype: Any, activations: Activations, **_: Any) -> str | None:
    if dtype == jnp.float32 and activations == "A32":
        return "float32 takes six bf16 passes, for comparisons; a dense product takes one by default"
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Pack trits into int32 words in the bf16 order; groups are padded to multiples of 16."""
    return layout.pack(w, "bf16", NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    return layout.unpack(w, "bf16")


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations, interpret: bool = False) -> jax.Array:
    """Multiply: x · ŵ.

    With more than 256 rows, weights are rounded to bf16, and with them group scales of more than 8 significant bits.
    With A16 activations are rounded to bf16. With A8 the rounded activations are bf16 too, which holds ±127 exactly.
    """
    return multiply(x, w, "bf16", activations, interpret=interpret)


def multiply(x: jax.Array, w: PackedTensor, order: Order, activations: Activations, *, interpret: bool) -> jax.Array:
    """The product in either order, with K of `x` padded like K of `w`."""
    rows, level = quantize_activations(x) if activations == "A8" else (x, None)
    if activations != "A32" and order == "bf16":
        rows = rows.astype(jnp.bfloat16)
    return tpu_dot(
        layout.spread(rows, w.group, layout.GRANULE[order], layout.BLOCK, -1),
        w.data,
        w.scale,
        level,
        order=order,
        group=layout.padded(w.group, layout.GRANULE[order]),
        out_dtype=x.dtype,
        device=DEVICES.get(traced_device()[0], SMALLEST),
        interpret=interpret,
    )[:, : w.layer_shape[1]]
