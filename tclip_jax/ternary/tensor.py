"""Ternary weights as arrays: trits with their scales, and packed for one implementation of the product."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=("trits", "scale"), meta_fields=("group", "axis"))
@dataclasses.dataclass(frozen=True)
class TernaryTensor:
    """A weight ŵ = scale · trit, stored as its two factors.

    Invariants: `scale` has the shape of `trits` but for `axis`, where it has ceil(K / group) entries, or 1 for a scale
    per output channel; a scale per tensor has 1 on both of the last two axes. Leading axes (stacked layers) are equal.

    Attributes:
      trits: int8 of −1, 0, +1, shape (..., K, N); for an embedding table (V, W).
      scale: float32, not negative; 0 only where every trit of the group is 0.
      group: number of consecutive weights along `axis` that share a scale; the last group may be shorter.
      axis: the input axis, counted from the end: −2 for a kernel (K, N), −1 for an embedding (V, W).
    """

    trits: jax.Array
    scale: jax.Array
    group: int
    axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        return self.trits.shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The weights scale · trit in `dtype`; exact in bfloat16 too when the scale has 8 significant bits.

        Raises:
          TypeError: a dtype that is not floating, in which scales below 1 would be 0.
        """
        check_floating("the dtype of the weights", dtype)
        scale = expand_scale(self.scale, self.group, self.trits.shape[self.axis], self.axis)
        return self.trits.astype(dtype) * scale.astype(dtype)


def check_floating(what: str, dtype: jax.typing.DTypeLike) -> None:
    """Raises TypeError for integers and bools, in which what is computed would be cut to 0 and 1."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} is {jnp.dtype(dtype).name}: it must be floating, as float32 or bfloat16")


def expand_scale(scale: jax.Array, group: int, length: int, axis: int) -> jax.Array:
    """Repeats group scales along `axis` to `length` entries; a single scale is left to broadcast."""
    count = scale.shape[axis]
    if count == 1:
        return scale
    after = axis % scale.ndim + 1
    repeated = jnp.broadcast_to(
        jnp.expand_dims(scale, after), (*scale.shape[:after], group, *scale.shape[after:])
    ).reshape(*scale.shape[: after - 1], count * group, *scale.shape[after:])
    return jax.lax.slice_in_dim(repeated, 0, length, axis=after - 1)


Activations = Literal["A16", "A8"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale"),
    meta_fields=("shape", "group", "layout", "activations"),
)
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A ternary weight repacked for one implementation; only that one knows the order of `data` and `scale`.

    Attributes:
      data: bytes or words; may have a leading layer axis, which nn.scan slices.
      scale: float32 or bfloat16.
      shape: (K, N) of one layer's weight; (V, W) of an embedding table.
      group: consecutive weights along K (W of a table) that share a scale.
      layout: name of the implementation; "rows" of an embedding table.
      activations: how it is multiplied where the caller does not say.
    """

    data: jax.Array
    scale: jax.Array
    shape: tuple[int, int]
    group: int
    layout: str
    activations: Activations = "A16"


def traced_device() -> tuple[str, str]:
    """Kind and platform of the device that a function traced now will run on: the mesh's, else jax's default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        default = jax.config.values["jax_default_device"]
        described = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return described.device_kind, described.platform
