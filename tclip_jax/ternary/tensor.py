"""The ternary tensor: trits and the scales they are multiplied by."""

from __future__ import annotations

import dataclasses
import functools

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
