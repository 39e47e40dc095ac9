"""Quantized weights as arrays: trits with their scales, or packed for one implementation of the product."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp


class QuantizedTensor(abc.ABC):
    """What `TernaryTensor` and `UniformTensor` share: a weight ŵ = scale · integer, stored as its two factors.

    Attributes:
      scale: float32, at least 0. The shape is that of the weight (..., K, N), except for `axis`: ceil(K / group)
        entries, or 1 for a scale per output channel. A scale per tensor has 1 on both of the last axes.
      group: number of consecutive weights along `axis` that share a scale; the last group may be short.
      axis: the input axis, counted from the end: −2 for a kernel (K, N), −1 for an embedding table (V, W).
    """

    scale: jax.Array
    group: int
    axis: int

    @property
    @abc.abstractmethod
    def integers(self) -> jax.Array:
        """The integers, int8 in the shape of the weight."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @abc.abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Compute the weights scale · integer, in the shape of the weight."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("trits", "scale"), meta_fields=("group", "axis"))
@dataclasses.dataclass(frozen=True)
class TernaryTensor(QuantizedTensor):
    """A ternary weight ŵ = scale · trit, stored as its two factors; a pytree.

    Attributes:
      trits: int8 of −1, 0 and +1, shape (..., K, N); (V, W) for an embedding table. Leading axes are stacked layers.
      scale: float32, at least 0; 0 only if every trit of its group is 0. The shape is that of `trits`, except for
        `axis`: ceil(K / group) entries, or 1 for a scale per output channel. A scale per tensor has 1 on both of the
        last axes.
      group: number of consecutive weights along `axis` that share a scale; the last group may be short.
      axis: the input axis, counted from the end: −2 for a kernel (K, N), −1 for an embedding table (V, W).
    """

    trits: jax.Array
    scale: jax.Array
    group: int
    axis: int = -2

    def __repr__(self) -> str:
        return (
            f"TernaryTensor({_kind(self.trits)} trits, {_kind(self.scale)} scale, group={self.group}, axis={self.axis})"
        )

    @property
    def integers(self) -> jax.Array:
        """The trits."""
        return self.trits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the trits."""
        return self.trits.shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Compute the weights scale · trit.

        Args:
          dtype: dtype of the result. bfloat16 is exact for scales of 8 significant bits.

        Returns:
          Floats in the shape of the trits.

        Raises:
          TypeError: `dtype` is not floating; scales below 1 would become 0.
        """
        check_floating("the dtype of the weights", dtype)
        scale = expand_scale(self.scale, self.group, self.trits.shape[self.axis], self.axis)
        return self.trits.astype(dtype) * scale.astype(dtype)


def check_floating(what: str, dtype: jax.typing.DTypeLike) -> None:
    """Raise TypeError if `dtype` is not floating: integers and bools would truncate the values."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{what} is {jnp.dtype(dtype).name}: it must be floating, as float32 or bfloat16")


def expand_scale(scale: jax.Array, group: int, length: int, axis: int) -> jax.Array:
    """Repeat the scales of groups along `axis` to `length` entries; return a single scale unchanged, to broadcast."""
    count = scale.shape[axis]
    if count == 1:
        return scale
    after = axis % scale.ndim + 1
    repeated = jnp.broadcast_to(
        jnp.expand_dims(scale, after), (*scale.shape[:after], group, *scale.shape[after:])
    ).reshape(*scale.shape[: after - 1], count * group, *scale.shape[after:])
    return jax.lax.slice_in_dim(repeated, 0, length, axis=after - 1)


Activations = Literal["A32", "A16", "A8"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale"),
    meta_fields=("layer_shape", "group", "layout", "activations"),
)
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A ternary weight packed for one implementation, which defines the layout of `data` and `scale`; a pytree.

    `trits`, `dequantize` and `shape` are those of the `TernaryTensor` that `tclip_jax.ternary.unpack` returns.

    Attributes:
      data: packed trits, bytes or words. A leading layer axis may precede the layout; `nn.scan` slices it.
      scale: float32 or bfloat16.
      layer_shape: (K, N) of the weight of one layer; (V, W) of an embedding table.
      group: number of consecutive weights along K (W of a table) that share a scale.
      layout: name of the implementation; "rows" for an embedding table.
      activations: the default of `ternary_matmul` for this weight.
    """

    data: jax.Array
    scale: jax.Array
    layer_shape: tuple[int, int]
    group: int
    layout: str
    activations: Activations = "A32"

    def __repr__(self) -> str:
        return (
            f"PackedTensor({_kind(self.data)} data, {_kind(self.scale)} scale, layer_shape={self.layer_shape},"
            f" group={self.group}, layout={self.layout!r}, activations={self.activations!r})"
        )

    @property
    def trits(self) -> jax.Array:
        """The trits, int8, with the layer axis if there is one."""
        return _unpack(self).trits

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the trits."""
        return jax.eval_shape(_unpack, self).shape

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Compute the weights as `TernaryTensor.dequantize`."""
        return _unpack(self).dequantize(dtype)


def _kind(x: object) -> str:
    """Describe an array as "int8[2, 3]"; a pytree may hold something else in its place."""
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else repr(x)


def _unpack(w: PackedTensor) -> TernaryTensor:
    from tclip_jax.ternary.matmul import unpack  # the implementations import this file

    return unpack(w)


def traced_device() -> tuple[str, str]:
    """Return kind and platform of the device that a function traced now will run on.

    It is a device of the mesh in force, otherwise JAX's default device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        default = jax.config.values["jax_default_device"]
        described = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return described.device_kind, described.platform
