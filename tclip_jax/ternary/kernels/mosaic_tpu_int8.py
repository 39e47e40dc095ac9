"""Ternary product on the int8 matrix unit of TPUs v5e, v5p and v6e with A8: 2 bits per weight in HBM.

v4 has no int8 product. The kernel is compiled ahead of time (`benchmarks/tpu_static.py`) and tested in Pallas'
interpreter; it has not run on a TPU yet. With many rows its advantage is the int8 rate, which dense int8 weights share.
"""

from __future__ import annotations

from typing import Any

import jax

from tclip_jax.ternary.kernels import layout, mosaic_tpu
from tclip_jax.ternary.kernels.layout import DEVICES
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor

NAME = "mosaic_tpu_int8"


def unsupported(*, device_kind: str, activations: Activations, **given: Any) -> str | None:
    if activations != "A8":
        return "it multiplies int8 activations: A8"
    if device_kind in DEVICES and not DEVICES[device_kind].int8:
        return f"{device_kind} has no int8 matrix unit"
    return mosaic_tpu.unsupported(device_kind=device_kind, **given)


def slower(*, shape: tuple[int, int], group: int, **_: Any) -> str | None:
    if group < shape[0] and group % layout.BLOCK:
        return f"groups of {group} are padded to {layout.padded(group, layout.BLOCK)}"
    return None


def pack(w: TernaryTensor) -> PackedTensor:
    """Pack trits into int32 words in the int8 order; groups are padded to multiples of 128."""
    return layout.pack(w, "int8", NAME)


def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    return layout.unpack(w, "int8")


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations, interpret: bool = False) -> jax.Array:
    """Multiply `x`, rounded to int8, by ŵ: int32 sums of each group, scaled in float32.

    Raises:
      ValueError: activations other than "A8".
    """
    if activations != "A8":
        raise ValueError(f"{NAME} multiplies int8 activations: activations must be 'A8', not {activations!r}")
    return mosaic_tpu.multiply(x, w, "int8", activations, interpret=interpret)
