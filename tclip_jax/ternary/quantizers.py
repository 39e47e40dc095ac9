"""Float weights to trits and scales, and back through a straight-through gradient.

Every result depends on the bits of the weights alone: sums are halving trees, nothing is divided by data, and scales
are rounded to few bits, so that jit, eager, scan, sharding and NumPy agree to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.ternary.tensor import TernaryTensor, expand_scale


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """The factor-k quantizer: s = k · mean|w| of the group, t = sign(w) · (|w| > s/2), ŵ = s · t.

    k = 2 is TernaryCLIP's (arXiv 2510.21879, as its authors' EdgeRazor library has it), k = 1 is BitNet b1.58's
    absmean (arXiv 2402.17764).

    Attributes:
      factor: k.
      group: consecutive weights along the input axis that share a scale; or one a "channel" (output), or a "tensor".
      scale_bits: significant bits of a scale: 8 is exact in float16, bfloat16 and float32; 11 in float16; 24 keeps all.

    Raises:
      ValueError: a value outside its range.
    """

    factor: float = 2.0
    group: int | Literal["channel", "tensor"] = 256
    scale_bits: Literal[8, 11, 24] = 8

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"quantizer factor is {self.factor}: it must be above 0 (TernaryCLIP 2, BitNet b1.58 1)")
        if self.group not in ("channel", "tensor") and not (isinstance(self.group, int) and self.group > 0):
            raise ValueError(f"quantizer group is {self.group!r}: it must be a positive integer, 'channel' or 'tensor'")
        if self.scale_bits not in (8, 11, 24):
            raise ValueError(f"quantizer scale_bits is {self.scale_bits}: it must be 8, 11 or 24")

    @property
    def smallest_scale(self) -> float:
        """2⁻¹⁷ for 8 bits, 2⁻¹⁴ for 11: the least scale that a float16 holds with all its bits."""
        return 2.0 ** (min(self.scale_bits, 11) - 25)


def halving_sum(x: jax.Array, axis: int) -> jax.Array:
    """Sums along `axis` in a fixed order, keeping the axis: pad to a power of two, then x[:n/2] + x[n/2:] down to 1."""
    axis %= x.ndim
    length = 1 << max(x.shape[axis] - 1, 0).bit_length()
    if length != x.shape[axis]:
        x = jnp.pad(x, [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)])
    while length > 1:
        length //= 2
        x = jax.lax.slice_in_dim(x, 0, length, axis=axis) + jax.lax.slice_in_dim(x, length, 2 * length, axis=axis)
    return x


def _group_sums(magnitude: jax.Array, group: int, axis: int) -> jax.Array:
    """Sums of `group` consecutive entries along `axis`, the last over what is left: axis length ceil(K / group)."""
    axis %= magnitude.ndim
    before, length, after = magnitude.shape[:axis], magnitude.shape[axis], magnitude.shape[axis + 1 :]
    count = -(-length // group)
    missing = count * group - length
    if missing:
        magnitude = jnp.pad(magnitude, [(0, missing if i == axis else 0) for i in range(magnitude.ndim)])
    return halving_sum(magnitude.reshape(*before, count, group, *after), axis + 1).squeeze(axis + 1)


def factor_scale(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> tuple[jax.Array, int]:
    """Scales of the groups of `w`, and the group length they stand for.

    Args:
      w: (..., K, N) weights.
      quantizer: factor, granularity and significant bits.
      axis: the input axis, −1 or −2.

    Returns:
      float32 scales as `TernaryTensor` wants them; +0 for a group of zeros, else at least `quantizer.smallest_scale`.
    """
    magnitude, length = jnp.abs(w).astype(jnp.float32), w.shape[axis]
    if quantizer.group == "tensor":
        group = length
        total = halving_sum(halving_sum(magnitude, axis), -3 - axis)
        members = np.array(length * w.shape[-3 - axis])
    else:
        group = length if quantizer.group == "channel" else min(quantizer.group, length)
        total = _group_sums(magnitude, group, axis)
        own = np.minimum(group, length - group * np.arange(total.shape[axis]))
        members = np.expand_dims(own, -1) if axis == -2 else own
    # The factor k/n is one constant: dividing by n would be a multiplication under jit and a division outside it.
    scale = total * jnp.asarray(quantizer.factor / members, jnp.float32)
    if quantizer.scale_bits < 24:
        # Not a cast there and back, which XLA may drop.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=quantizer.scale_bits - 1)
    return jnp.where(total == 0, 0.0, jnp.maximum(scale, quantizer.smallest_scale)), group


def ternarize(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> TernaryTensor:
    """Trits and scales of the latent weights `w` (..., K, N); the trit is 0 where |w| ≤ scale / 2."""
    scale, group = factor_scale(w, quantizer, axis)
    half = expand_scale(scale, group, w.shape[axis], axis) * 0.5
    w = w.astype(jnp.float32)
    trits = (w > half).astype(jnp.int8) - (w < -half).astype(jnp.int8)
    return TernaryTensor(trits, scale, group, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_quantize(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> jax.Array:
    """ŵ = scale · trit in the dtype of `w`, with the identity as its gradient (straight-through, no clipping).

    The scale is a function of `w` and is not differentiated (EdgeRazor). No residuals are kept.
    """
    scale, group = factor_scale(w, quantizer, axis)
    level = expand_scale(scale, group, w.shape[axis], axis)
    # Selecting, not multiplying, gives +0.0 for every zero trit.
    w32 = w.astype(jnp.float32)
    return jnp.where(jnp.abs(w32) > level * 0.5, jnp.copysign(level, w32), 0.0).astype(w.dtype)


def _fake_quantize_forward(w: jax.Array, quantizer: Quantizer, axis: int) -> tuple[jax.Array, None]:
    return fake_quantize(w, quantizer, axis), None


def _fake_quantize_backward(quantizer: Quantizer, axis: int, residuals: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (gradient,)


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)
