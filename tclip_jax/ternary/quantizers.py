"""Float weights to trits and scales: five quantizers behind one function.

Every result depends on the bits of the weights alone: sums have a fixed order, nothing is divided by data, and scales
are rounded to few bits, so that jit, eager, scan, sharding and NumPy agree to the bit.
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
    """ŵ = s · t with t = sign(w) · (|w| > Δ), and how s and Δ follow from a group of weights; m is its mean |w|.

    | kind | s, Δ | source |
    |---|---|---|
    | factor | s = k · m, Δ = s/2; k = 2 is TernaryCLIP's, k = 1 BitNet's | arXiv 2510.21879 (EdgeRazor), 2402.17764 |
    | twn | Δ = 0.7 · m, s = mean of the magnitudes above it | arXiv 1605.04711 |
    | least_squares | s = argmin Σ (w − ŵ)², found by sorting; Δ = s/2 | the optimum that twn approximates |
    | lsq | s = α, learned from 2 · m on; Δ = s/2 | arXiv 1902.08153 |
    | seq | s = 2/3 · α, learned from the largest magnitude on; Δ = s/2 = α/3 | ParetoQ, arXiv 2502.02631 |

    Attributes:
      factor: k, of kind "factor".
      group: consecutive weights along the input axis that share a scale; or one a "channel" (output), or a "tensor".
      scale_bits: significant bits of a scale: 8 is exact in float16, bfloat16 and float32; 11 in float16; 24 keeps all.
      kind: see the table.

    Raises:
      ValueError: a value outside its range.
    """

    factor: float = key(2.0, 'k of kind "factor": TernaryCLIP 2, BitNet b1.58 1', gt=0)
    group: int | Literal["channel", "tensor"] = key(256, "weights of the input axis that share a scale", ge=1)
    scale_bits: Literal[8, 11, 24] = key(8, "significant bits of a scale")
    kind: Literal["factor", "twn", "least_squares", "lsq", "seq"] = key("factor", "how scale and threshold follow")

    def __post_init__(self) -> None:
        check_values(Quantizer, vars(self), "quantizer")

    @property
    def smallest_scale(self) -> float:
        """2⁻¹⁷ for 8 bits, 2⁻¹⁴ for 11: the least scale that a float16 holds with all its bits."""
        return 2.0 ** (min(self.scale_bits, 11) - 25)

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter α beside the weight, not a function of it."""
        return self.kind in ("lsq", "seq")

    @property
    def description(self) -> str:
        """For tables: "k=2 group=256", "lsq group=channel"."""
        return f"{f'k={self.factor:g}' if self.kind == 'factor' else self.kind} group={self.group}"


class Levels(NamedTuple):
    """Scales and thresholds Δ, float32 in the shape of `TernaryTensor`'s scales, and the length of their groups."""

    scale: jax.Array
    threshold: jax.Array
    group: int


def find_levels(w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None) -> Levels:
    """The levels of the groups of `w`.

    Args:
      w: (..., K, N) weights.
      quantizer: kind, granularity and significant bits.
      axis: the input axis, −1 or −2.
      alpha: the learned α of the kinds lsq and seq, float32 in the shape of the scales.

    Returns:
      Scales that are +0 for a group of zeros whose scale is not learned, else at least `quantizer.smallest_scale`; of a
      group with NaN or infinity, NaN or infinity where the scale is not learned.

    Raises:
      TypeError: weights that are integers or bools.
      ValueError: a kind that learns its scale, without it.
    """
    check_floating("the weight", w.dtype)
    group = w.shape[axis] if isinstance(quantizer.group, str) else min(quantizer.group, w.shape[axis])
    if quantizer.learned:
        if alpha is None:
            raise ValueError(f"the quantizer {quantizer.kind} needs its learned scale: it is no function of the weight")
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
        raw = jnp.where(jnp.isfinite(total), raw, total)  # nothing is above a threshold that is NaN or infinite
        return Levels(jnp.where(total == 0, 0.0, _rounded(raw, quantizer)), threshold, group)
    # The factor k/n is one constant: dividing by n would be a multiplication under jit and a division outside it.
    raw = total * jnp.asarray(quantizer.factor / members, jnp.float32)
    scale = jnp.where(total == 0, 0.0, _rounded(raw, quantizer))
    return Levels(scale, scale * 0.5, group)


def initial_alpha(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> jax.Array:
    """Where the learned α of a weight starts: 2 · mean|w| for lsq, max|w| for seq, as in the papers.

    Float32 in the shape of the scales: axis K has ceil(K / group) entries, or 1.

    Raises:
      TypeError: weights that are integers or bools.
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
    """Trits and scales of the latent weights `w` (..., K, N), with the learned `alpha` where the kind has one.

    Raises what `find_levels` raises.
    """
    scale, threshold, group = find_levels(w, quantizer, axis, alpha)
    threshold = expand_scale(threshold, group, w.shape[axis], axis)
    w = w.astype(jnp.float32)
    trits = (w > threshold).astype(jnp.int8) - (w < -threshold).astype(jnp.int8)
    return TernaryTensor(trits, scale, group, axis)


def group_totals(x: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """Sums of `x` (..., K, N) over the weights that share a scale, in the shape of the scales and in a fixed order."""
    if quantizer.group == "tensor":
        return halving_sum(halving_sum(x, axis), -3 - axis)
    group = x.shape[axis] if quantizer.group == "channel" else min(quantizer.group, x.shape[axis])
    along = axis % x.ndim + 1
    return halving_sum(split_groups(x, group, axis), along).squeeze(along)


def group_members(shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> npt.NDArray[Any]:
    """How many weights share each scale; broadcasts against the scales. The last group of a row may be short."""
    length = shape[axis]
    if quantizer.group == "tensor":
        return np.array(length * shape[-3 - axis])
    group = length if quantizer.group == "channel" else min(quantizer.group, length)
    own = np.minimum(group, length - group * np.arange(-(-length // group)))
    return np.expand_dims(own, -1) if axis == -2 else own


def _rounded(scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale_bits < 24:
        # Not a cast there and back, which XLA may drop.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=quantizer.scale_bits - 1)
    return jnp.maximum(scale, quantizer.smallest_scale)


def _least_squares(magnitude: jax.Array, quantizer: Quantizer, group: int, axis: int) -> jax.Array:
    """The mean of the j largest of each group for the j that maximises (their sum)² / j; the least j of equal ones."""
    if quantizer.group == "tensor":
        x, along = magnitude.reshape(*magnitude.shape[:-2], 1, -1, 1), magnitude.ndim - 1
    else:
        x, along = split_groups(magnitude, group, axis), axis % magnitude.ndim + 1
    sums = prefix_sums(jnp.flip(jnp.sort(x, axis=along), along), along)
    counts = np.expand_dims(np.arange(1.0, x.shape[along] + 1), tuple(range(1, x.ndim - along)))
    # The zeros that fill the last group come last and never raise a sum, so they are not chosen.
    best = jnp.argmax(sums * jnp.asarray(counts**-0.5, jnp.float32), axis=along, keepdims=True)
    return jnp.take_along_axis(sums * jnp.asarray(1 / counts, jnp.float32), best, axis=along).squeeze(along)
