"""Quantization of float weights to trits and scales: five kinds of quantizers behind one function.

Results are bit-identical under jit, eager execution, scan and sharding, and in NumPy. To that end sums have a fixed
order, no result depends on how a division is rounded, and scales have few significant bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.schema import check_values, key
from tclip_jax.ternary.sums import halving_sum, prefix_sums, quotient, split_groups
from tclip_jax.ternary.tensor import TernaryTensor, check_floating, expand_scale


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A ternary quantizer: ŵ = s · t with t = sign(w) · (|w| > Δ).

    A group of weights shares the scale s and the threshold Δ. Below, m is the mean of |w| over the group.

    | kind | s, Δ | source |
    |---|---|---|
    | factor | s = k · m, Δ = s/2; TernaryCLIP k = 2, BitNet b1.58 k = 1 | arXiv 2510.21879 (EdgeRazor), 2402.17764 |
    | twn | Δ = 0.7 · m, s = mean of the magnitudes above Δ | TWN, arXiv 1605.04711 |
    | least_squares | s = argmin Σ (w − ŵ)², found by sorting; Δ = s/2 | the optimum that twn approximates |
    | lsq | s = α, learned, starts at 2 · m; Δ = s/2 | LSQ, arXiv 1902.08153 |
    | seq | s = 2/3 · α, α learned, starts at the largest magnitude; Δ = s/2 = α/3 | ParetoQ, arXiv 2502.02631 |

    Attributes:
      factor: k of kind "factor".
      group: number of consecutive weights along the input axis that share a scale; "channel" for one scale per output;
        "tensor" for one scale per matrix.
      scale_bits: significant bits of a scale. 8 bits are exact in float16, bfloat16 and float32, 11 bits in float16 and
        float32, 24 bits in float32.
      kind: the rule for scale and threshold, see the table.

    Raises:
      ValueError: a value is outside its range.
    """

    factor: float = key(2.0, 'k of kind "factor": TernaryCLIP 2, BitNet b1.58 1', gt=0)
    group: int | Literal["channel", "tensor"] = key(256, "weights of the input axis that share a scale", ge=1)
    scale_bits: Literal[8, 11, 24] = key(8, "significant bits of a scale")
    kind: Literal["factor", "twn", "least_squares", "lsq", "seq"] = key("factor", "rule for scale and threshold")

    def __post_init__(self) -> None:
        check_values(Quantizer, vars(self), "quantizer")

    @property
    def smallest_scale(self) -> float:
        """The smallest scale above 0: 2⁻¹⁷ for 8 bits, 2⁻¹⁴ for 11 and 24 bits.

        It is the least scale that float16 holds with all of its (at most 11) bits.
        """
        return 2.0 ** (min(self.scale_bits, 11) - 25)

    @property
    def learned(self) -> bool:
        """Whether the scale is computed from a learned parameter α instead of the weight."""
        return self.kind in ("lsq", "seq")

    @property
    def description(self) -> str:
        """Short text for tables, such as "k=2 group=256" or "lsq group=channel"."""
        return f"{f'k={self.factor:g}' if self.kind == 'factor' else self.kind} group={self.group}"


class Levels(NamedTuple):
    """Scales and thresholds of the groups of a weight.

    Attributes:
      scale: s, float32 in the shape of `TernaryTensor.scale`.
      threshold: Δ, float32 in the same shape.
      group: number of weights along the input axis that share them.
    """

    scale: jax.Array
    threshold: jax.Array
    group: int


def find_levels(w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None) -> Levels:
    """Compute the scale and the threshold of each group of weights.

    Args:
      w: floats (..., K, N).
      quantizer: kind, group size and significant bits.
      axis: the input axis, −1 or −2.
      alpha: the learned α of the kinds lsq and seq, float32 in the shape of the scales.

    Returns:
      The levels. A scale that is not learned is +0 for a group of zeros, and NaN or infinity for a group with NaN or
      infinity. All others are at least `quantizer.smallest_scale`.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: `alpha` is None and the kind learns its scale.
    """
    check_floating("the weight", w.dtype)
    group = w.shape[axis] if isinstance(quantizer.group, str) else min(quantizer.group, w.shape[axis])
    if quantizer.learned:
        if alpha is None:
            raise ValueError(f"the quantizer {quantizer.kind} needs its learned scale: pass alpha")
        scale = alpha if quantizer.kind == "lsq" else alpha * jnp.float32(2 / 3)
        scale = _rounded(scale, quantizer)
        return Levels(scale, scale * 0.5, group)
    magnitude = jnp.abs(w).astype(jnp.float32)
    if quantizer.kind == "least_squares":
        raw = _least_squares(magnitude, quantizer, group, axis)
        scale = jnp.where(raw == 0, 0.0, _rounded(raw, quantizer))
        return Levels(scale, scale * 0.5, group)
    total, members = group_totals(magnitude, quantizer, axis), group_members(w.shape, quantizer, axis)
    if quantizer.kind == "twn":
        threshold = total * jnp.asarray(0.7 / members, jnp.float32)
        kept = magnitude > expand_scale(threshold, group, w.shape[axis], axis)
        count = group_totals(kept.astype(jnp.float32), quantizer, axis)
        raw = quotient(group_totals(jnp.where(kept, magnitude, 0), quantizer, axis), jnp.maximum(count, 1))
        raw = jnp.where(jnp.isfinite(total), raw, total)  # no weight is above a threshold of NaN or infinity
        return Levels(jnp.where(total == 0, 0.0, _rounded(raw, quantizer)), threshold, group)
    # k/n is one constant: under jit XLA would turn a division by n into a multiplication, which rounds differently.
    raw = total * jnp.asarray(quantizer.factor / members, jnp.float32)
    scale = jnp.where(total == 0, 0.0, _rounded(raw, quantizer))
    return Levels(scale, scale * 0.5, group)


def initial_alpha(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> jax.Array:
    """Compute the initial value of the learned α: 2 · mean|w| for lsq, max|w| for seq.

    The values are those of LSQ (arXiv 1902.08153) and ParetoQ (arXiv 2502.02631).

    Args:
      w: floats (..., K, N).
      quantizer: of kind lsq or seq.
      axis: the input axis, −1 or −2.

    Returns:
      float32 in the shape of `TernaryTensor.scale`.

    Raises:
      TypeError: the weights are integers or bools.
    """
    check_floating("the weight", w.dtype)
    if quantizer.kind == "lsq":
        return find_levels(w, Quantizer(2.0, quantizer.group, 24), axis).scale
    magnitude = jnp.abs(w).astype(jnp.float32)
    if quantizer.group == "tensor":
        return magnitude.max(axis=(-1, -2), keepdims=True)
    group = w.shape[axis] if quantizer.group == "channel" else min(quantizer.group, w.shape[axis])
    return split_groups(magnitude, group, axis).max(axis=axis % w.ndim + 1)


def ternarize(w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None) -> TernaryTensor:
    """Quantize latent weights to trits and scales: t = sign(w) · (|w| > Δ), with s and Δ as in `Quantizer`.

    Args:
      w: floats (..., K, N); (V, W) for an embedding table.
      quantizer: kind, group size and significant bits.
      axis: the input axis: −2 for a kernel, −1 for an embedding table.
      alpha: the learned α of the kinds lsq and seq, float32 in the shape of the scales.

    Returns:
      Trits int8 in the shape of `w`, and float32 scales.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: `alpha` is None and the kind learns its scale.
    """
    scale, threshold, group = find_levels(w, quantizer, axis, alpha)
    threshold = expand_scale(threshold, group, w.shape[axis], axis)
    w = w.astype(jnp.float32)
    trits = (w > threshold).astype(jnp.int8) - (w < -threshold).astype(jnp.int8)
    return TernaryTensor(trits, scale, group, axis)


def group_totals(x: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """Sum `x` (..., K, N) over the weights that share a scale, in a fixed order, to the shape of the scales."""
    if quantizer.group == "tensor":
        return halving_sum(halving_sum(x, axis), -3 - axis)
    group = x.shape[axis] if quantizer.group == "channel" else min(quantizer.group, x.shape[axis])
    along = axis % x.ndim + 1
    return halving_sum(split_groups(x, group, axis), along).squeeze(along)


def group_members(shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> npt.NDArray[Any]:
    """Number of weights that share each scale, broadcastable to the scales; the last group of a row may be short."""
    length = shape[axis]
    if quantizer.group == "tensor":
        return np.array(length * shape[-3 - axis])
    group = length if quantizer.group == "channel" else min(quantizer.group, length)
    own = np.minimum(group, length - group * np.arange(-(-length // group)))
    return np.expand_dims(own, -1) if axis == -2 else own


def _rounded(scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale_bits < 24:
        # XLA may remove a cast to a narrow dtype and back.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=quantizer.scale_bits - 1)
    return jnp.maximum(scale, quantizer.smallest_scale)


def _least_squares(magnitude: jax.Array, quantizer: Quantizer, group: int, axis: int) -> jax.Array:
    """The scale with the least squared error: the mean of the j largest magnitudes of each group.

    j maximises (sum of the j largest)² / j; the smallest j wins a tie.
    """
    if quantizer.group == "tensor":
        x, along = magnitude.reshape(*magnitude.shape[:-2], 1, -1, 1), magnitude.ndim - 1
    else:
        x, along = split_groups(magnitude, group, axis), axis % magnitude.ndim + 1
    sums = prefix_sums(jnp.flip(jnp.sort(x, axis=along), along), along)
    counts = np.expand_dims(np.arange(1.0, x.shape[along] + 1), tuple(range(1, x.ndim - along)))
    # Zeros that pad the last group are sorted last and do not increase a sum, so argmax does not select them.
    best = jnp.argmax(sums * jnp.asarray(counts**-0.5, jnp.float32), axis=along, keepdims=True)
    return jnp.take_along_axis(sums * jnp.asarray(1 / counts, jnp.float32), best, axis=along).squeeze(along)
