"""The kinds of quantizers of the package: scales, thresholds and gradients. `Quantizer` has their table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.ternary.quantizers import (
    QUANTIZERS,
    Kind,
    Quantizer,
    find_levels,
    group_maxima,
    group_means,
    group_members,
    group_size,
    group_totals,
)
from tclip_jax.ternary.sums import prefix_sums, quotient, split_groups
from tclip_jax.ternary.tensor import expand_scale
from tclip_jax.ternary.uniform import largest_integer

# ParetoQ rounds 1.5 · clip(w / α, −0.99, 0.99): a weight above 0.99 · α is saturated.
_SEQ_INSIDE = 0.99
# Sherry's block: 4 positions of the zero times 2³ signs are 5 bits, 1.25 a weight.
_BLOCK = 4

RawLevels = tuple[jax.Array, jax.Array | None]


def _factor(w: jax.Array, quantizer: Quantizer, axis: int) -> RawLevels:
    return group_means(_magnitude(w), quantizer, axis, quantizer.factor), None


def _twn(w: jax.Array, quantizer: Quantizer, axis: int) -> RawLevels:
    magnitude = _magnitude(w)
    total = group_totals(magnitude, quantizer, axis)
    threshold = total * jnp.asarray(0.7 / group_members(w.shape, quantizer, axis), jnp.float32)
    kept = magnitude > expand_scale(threshold, group_size(w.shape, quantizer, axis), w.shape[axis], axis)
    return _mean_of(kept, magnitude, total, quantizer, axis), threshold


def _sherry(w: jax.Array, quantizer: Quantizer, axis: int) -> RawLevels:
    """Three of four consecutive weights of the input axis are nonzero: the first of the smallest magnitude is zero.

    Weights of exactly 0 are zero too. A last block of fewer than four weights has no zero of its own.
    """
    magnitude, axis_ = _magnitude(w), axis % w.ndim
    blocks = split_groups(magnitude, _BLOCK, axis)  # zeros fill the last block, and are its smallest
    padding = split_groups(jnp.ones_like(magnitude), _BLOCK, axis) == 0
    smallest = jnp.argmin(jnp.where(padding, -1.0, blocks), axis=axis_ + 1, keepdims=True)
    places = jax.lax.broadcasted_iota(smallest.dtype, blocks.shape, axis_ + 1)
    dropped = (places == smallest).reshape(*blocks.shape[:axis_], -1, *blocks.shape[axis_ + 2 :])
    threshold = jnp.where(jax.lax.slice_in_dim(dropped, 0, w.shape[axis], axis=axis_), magnitude, 0)
    total = group_totals(magnitude, quantizer, axis)
    return _mean_of(magnitude > threshold, magnitude, total, quantizer, axis), threshold


def _mean_of(kept: jax.Array, magnitude: jax.Array, total: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """The mean of the magnitudes that are kept, in each group; `total` is the sum of all magnitudes."""
    count = group_totals(kept.astype(jnp.float32), quantizer, axis)
    scale = quotient(group_totals(jnp.where(kept, magnitude, 0), quantizer, axis), jnp.maximum(count, 1))
    scale = jnp.maximum(scale, jnp.where(total == 0, 0.0, quantizer.smallest_scale))
    # No weight is above a threshold of NaN or infinity.
    return jnp.where(jnp.isfinite(total), scale, total)


def _least_squares(w: jax.Array, quantizer: Quantizer, axis: int) -> RawLevels:
    """The scale with the least squared error: the mean of the j largest magnitudes of each group.

    j maximises (sum of the j largest)² / j; the smallest j wins a tie.
    """
    magnitude = _magnitude(w)
    if quantizer.group == "tensor":
        x, along = magnitude.reshape(*magnitude.shape[:-2], 1, -1, 1), magnitude.ndim - 1
    else:
        x, along = split_groups(magnitude, group_size(w.shape, quantizer, axis), axis), axis % magnitude.ndim + 1
    sums = prefix_sums(jnp.flip(jnp.sort(x, axis=along), along), along)
    counts = np.expand_dims(np.arange(1.0, x.shape[along] + 1), tuple(range(1, x.ndim - along)))
    # Zeros that pad the last group are sorted last and do not increase a sum, so argmax does not select them.
    best = jnp.argmax(sums * jnp.asarray(counts**-0.5, jnp.float32), axis=along, keepdims=True)
    return jnp.take_along_axis(sums * jnp.asarray(1 / counts, jnp.float32), best, axis=along).squeeze(along), None


def _lsq(w: jax.Array, quantizer: Quantizer, axis: int, alpha: jax.Array) -> RawLevels:
    return alpha, None


def _lsq_alpha(w: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """2 · mean|w| (arXiv 1902.08153, section 2.1, for levels −1 to 1)."""
    return find_levels(w, Quantizer(2.0, quantizer.group, 24), axis).scale


def _lsq_gradient(
    g: jax.Array, w: jax.Array, scale: jax.Array, threshold: jax.Array, quantizer: Quantizer, axis: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """With x = w / s: `w` gets g where |x| < 1; α gets Σ g · (t − x, or sign(w) outside) / sqrt(weights that share α).

    arXiv 1902.08153, equations 3 and 5.
    """
    x = w / scale
    inside, slope = jnp.abs(x) < 1, _trits(w, threshold) - x
    return _learned_gradient(g, w, inside, slope, group_members(w.shape, quantizer, axis), quantizer, axis)


def _seq(w: jax.Array, quantizer: Quantizer, axis: int, alpha: jax.Array) -> RawLevels:
    return alpha * jnp.float32(2 / 3), None


def _seq_alpha(w: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """max|w| (arXiv 2502.02631)."""
    return group_maxima(_magnitude(w), quantizer, axis)


def _seq_gradient(
    g: jax.Array, w: jax.Array, scale: jax.Array, threshold: jax.Array, quantizer: Quantizer, axis: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """With x = w / (1.5 · s): `w` gets g where |x| ≤ 0.99; α gets Σ g · (2/3 · t − x, or sign(w)) / sqrt(all weights).

    The code of ParetoQ, arXiv 2502.02631.
    """
    x = w / (1.5 * scale)
    inside, slope = jnp.abs(x) <= _SEQ_INSIDE, 2 / 3 * _trits(w, threshold) - x
    return _learned_gradient(g, w, inside, slope, np.array(size), quantizer, axis)


def _uniform(w: jax.Array, quantizer: Quantizer, axis: int) -> RawLevels:
    """max|w| / (2^(bits − 1) − 1): no weight is clipped, and none is further than s/2 from its multiple."""
    # Times a constant: under jit XLA would turn the division into this multiplication, which rounds differently.
    largest = group_maxima(_magnitude(w), quantizer, axis)
    scale = largest * jnp.float32(1 / largest_integer(quantizer.bits))
    return jnp.where(largest == 0, 0.0, jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)), None


def _learned_gradient(
    g: jax.Array,
    w: jax.Array,
    inside: jax.Array,
    slope: jax.Array,
    members: np.ndarray,
    quantizer: Quantizer,
    axis: int,
) -> tuple[jax.Array, jax.Array]:
    each = g * jnp.where(inside, slope, jnp.sign(w))
    to_alpha = group_totals(each, quantizer, axis) * jnp.asarray(members**-0.5, jnp.float32)
    return jnp.where(inside, g, 0), to_alpha


def _trits(w: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.sign(w) * (jnp.abs(w) > threshold)


def _magnitude(w: jax.Array) -> jax.Array:
    return jnp.abs(w).astype(jnp.float32)


QUANTIZERS.extend(
    {
        "factor": Kind(_factor),
        "twn": Kind(_twn),
        "least_squares": Kind(_least_squares),
        "lsq": Kind(_lsq, _lsq_gradient, _lsq_alpha),
        "seq": Kind(_seq, _seq_gradient, _seq_alpha),
        "sherry": Kind(_sherry),
        "uniform": Kind(_uniform, uniform=True),
    }
)
