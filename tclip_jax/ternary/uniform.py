"""Uniform quantization with 4 or 8 bits: rounding of weights to integers, and the tensor that holds them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.ternary.packing import pack_fields, unpack_fields
from tclip_jax.ternary.tensor import QuantizedTensor, check_floating, expand_scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale"),
    meta_fields=("bits", "length", "group", "axis"),
)
@dataclasses.dataclass(frozen=True)
class UniformTensor(QuantizedTensor):
    """A weight ŵ = scale · integer of 4 or 8 bits, its integers packed; a pytree.

    The integers are −(2^(bits − 1) − 1) … 2^(bits − 1) − 1: symmetric, so −8 and −128 are not used.

    Attributes:
      data: uint8, the integers packed along `axis` by `pack_fields`: (..., ceil(K · bits / 8), N) for a kernel,
        (V, ceil(W · bits / 8)) for an embedding table. Leading axes are stacked layers.
      scale: float32 or bfloat16, in the shape that `QuantizedTensor` describes.
      bits: 4 or 8.
      length: K, or W for a table.
      group: as in `QuantizedTensor`.
      axis: as in `QuantizedTensor`.
    """

    data: jax.Array
    scale: jax.Array
    bits: int
    length: int
    group: int
    axis: int = -2

    @property
    def integers(self) -> jax.Array:
        """The integers, int8 (..., K, N)."""
        return unpack_fields(self.data, self.bits, self.length, self.axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the integers."""
        shape = [*self.data.shape]
        shape[self.axis] = self.length
        return tuple(shape)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Compute the weights scale · integer in float32, and round them to `dtype`.

        Args:
          dtype: dtype of the result. float32 is exact for scales of 8 and 11 significant bits.

        Returns:
          Floats in the shape of the integers.

        Raises:
          TypeError: `dtype` is not floating.
        """
        return dequantize_integers(self.integers, self.scale, self.group, self.axis, dtype)

    def rows(self, index: jax.Array) -> UniformTensor:
        """Look up rows of an embedding table: a tensor (..., W) for integers `index` (...)."""
        # If all rows share a scale, it has one row; "clip" maps every index to it.
        scale = jnp.take(jnp.asarray(self.scale), index, axis=0, mode="clip")
        return dataclasses.replace(self, data=jnp.asarray(self.data)[index], scale=scale)


def largest_integer(bits: int) -> int:
    """Return 2^(bits − 1) − 1, the largest integer: 7 for 4 bits, 127 for 8 bits."""
    return 2 ** (bits - 1) - 1


def pack_uniform(integers: Any, scale: Any, bits: int, group: int, axis: int) -> UniformTensor:
    """Pack integers (..., K, N) of `bits` bits, int8, and their scales."""
    return UniformTensor(pack_fields(integers, bits, axis), scale, bits, integers.shape[axis], group, axis)


def dequantize_integers(
    integers: jax.Array, scale: jax.Array, group: int, axis: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Compute scale · integer in float32, and round it to `dtype`; see `UniformTensor.dequantize`."""
    check_floating("the dtype of the weights", dtype)
    expanded = expand_scale(jnp.asarray(scale, jnp.float32), group, integers.shape[axis], axis)
    return (integers.astype(jnp.float32) * expanded).astype(dtype)


def round_to_integers(w: jax.Array, scale: jax.Array, largest: int) -> jax.Array:
    """Round weights to the nearest multiples of their scales: q = min(round(|w| / s), largest) · sign(w).

    A weight half-way between two multiples is rounded to the smaller one, as a weight at the threshold s/2 of a ternary
    kind is. For scales of 8 and 11 significant bits the result depends on no rounding.

    Args:
      w: floats (..., K, N).
      scale: float32, broadcastable to `w`.
      largest: the largest integer.

    Returns:
      Integers as float32, in the shape of `w`; 0 where the scale is 0, NaN or infinite.
    """
    magnitude = jnp.abs(w.astype(jnp.float32))
    usable = (scale > 0) & jnp.isfinite(scale)
    step = jnp.where(usable, scale, 1)
    near = jnp.minimum(jnp.round(magnitude / step), largest)
    # The rounding of a division differs between machines, so the quotient may be one off. (q ± 1/2) · s is exact.
    near = near + (magnitude > (near + 0.5) * step) - (magnitude <= (near - 0.5) * step)
    near = jnp.minimum(near, largest)
    # jnp.where gives +0.0 for every zero; a product would also give −0.0.
    return jnp.where(usable & (near > 0), jnp.copysign(near, w), 0.0)


def check_integers(integers: np.ndarray, bits: int) -> None:
    """Raise ValueError unless all values are integers of the symmetric range of `bits` bits."""
    largest = largest_integer(bits)
    if integers.dtype.kind not in "iu":  # the cast would truncate floats
        raise ValueError(f"integers of {bits} bits are {integers.dtype}: they must be of an integer dtype")
    if integers.size and not -largest <= integers.min() <= integers.max() <= largest:
        raise ValueError(
            f"integers of {bits} bits are −{largest} to {largest}: found {integers.min()} to {integers.max()}"
        )
