"""Compute latent weights that a quantizer maps to given trits and scales, to continue training from ternary weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.artifacts.pack import compiled_quantize
from tclip_jax.interop.recover import repeat_groups, scale_bits
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer
from tclip_jax.parallel.sharding import path_of
from tclip_jax.ternary import QuantizedTensor, Quantizer, TernaryTensor, UniformTensor, expand_scale

Array = npt.NDArray[Any]


# Preferred magnitude of the latent weight of a zero trit, as a fraction of s: half of the threshold s/2.
_ZERO = 0.25
# Largest preferred magnitude of nonzero weights, as a multiple of s. Beyond it the zeros get larger magnitudes instead.
_FAR = 2.0


def latent_params(params: Mapping[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Apply `latent_from_ternary` to every `TernaryTensor` of a tree; other leaves are unchanged.

    The values of a `UniformTensor` are such latent weights themselves, if the quantizer maps them to themselves.

    Args:
      params: parameter tree with quantized and float leaves.
      rules: the quantizer for each path pattern; every quantized leaf needs one.

    Raises:
      ValueError: a quantized parameter has no rule, or its quantizer cannot reproduce it; the message has its path.
    """

    def latent(key_path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedTensor):
            return leaf
        path = path_of(key_path)
        quantizer = find_quantizer(path, rules) if path in TERNARIZABLE else None
        if quantizer is None:
            kind = f"has integers of {leaf.bits} bits" if isinstance(leaf, UniformTensor) else "is ternary"
            raise ValueError(f"{path} {kind}, but no rule of the run matches it")
        try:
            if isinstance(leaf, UniformTensor):
                check_reproduced(leaf, quantizer)
                return leaf
            assert isinstance(leaf, TernaryTensor)
            return latent_from_ternary(leaf, quantizer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    return jax.tree_util.tree_map_with_path(latent, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def latent_from_ternary(t: TernaryTensor, quantizer: Quantizer) -> npt.NDArray[np.float32]:
    """Return weights w such that ternarize(jnp.asarray(w), quantizer) equals `t`, bit for bit.

    The quantizer may have other groups than `t`: finer groups, or coarser groups in which all scales are equal.

    In each group all zero trits get one magnitude, s/4 if possible, with alternating signs. All nonzero trits get the
    magnitude that makes the mean magnitude s/k. Both are multiples of the last bit of the group's sum, so the sum is
    exact.

    Args:
      t: trits and scales (K, N) or (L, K, N).
      quantizer: a quantizer of kind "factor" with factor k.

    Returns:
      float32 weights of the shape of `t`.

    Raises:
      ValueError: the quantizer cannot produce the scales: a group has several, a scale has too many significant bits,
        or 2/k or more of a group is nonzero, although each nonzero must exceed s/2 (for k = 2: no zeros).
    """
    if quantizer.kind != "factor":
        raise ValueError(f"latent weights exist only for quantizers of kind factor, not {quantizer.kind}")
    if quantizer.dead_zone_bias:
        raise ValueError("latent weights of zeros would change the layer's bias: set quantizer.dead_zone_bias = 0")
    trits, scale, length = np.asarray(t.trits), np.asarray(t.scale, np.float32), t.shape[t.axis]
    if trits.ndim == 3:
        parts = (TernaryTensor(*part, t.group, t.axis) for part in zip(trits, scale, strict=True))
        return np.stack([latent_from_ternary(part, quantizer) for part in parts])
    group = length if isinstance(quantizer.group, str) else min(quantizer.group, length)
    shared = quantizer.group == "tensor"
    if group != t.group or shared != (scale.shape == (1, 1) != trits.shape):
        scale = _regrouped(trits, repeat_groups(scale, t.group, length, t.axis), group, t.axis, shared)
    if shared:  # one group of all weights
        w = _latent(trits.reshape(-1, 1), scale, trits.size, -2, quantizer.factor).reshape(trits.shape)
    else:
        w = _latent(trits, scale, group, t.axis, quantizer.factor)
    again = jax.device_get(compiled_quantize(w, quantizer, t.axis))
    if not np.array_equal(again.trits, trits) or again.scale.tobytes() != scale.tobytes():
        raise ValueError(_why_not(trits, scale, again, quantizer))
    return w


def check_reproduced(t: UniformTensor, quantizer: Quantizer) -> None:
    """Check that the quantizer maps the values of `t` to its integers and scales; its groups may be others.

    Raises:
      ValueError: it does not; the message says what would change.
    """
    if not quantizer.uniform or quantizer.bits != t.bits:
        raise ValueError(f"the quantizer {quantizer.description} gives no integers of {t.bits} bits")
    again = jax.device_get(compiled_quantize(np.asarray(t.dequantize(), np.float32), quantizer, t.axis))
    integers, length = np.asarray(t.integers), t.shape[t.axis]
    scales = (np.asarray(expand_scale(each.scale, each.group, length, t.axis), np.float32) for each in (t, again))
    others = int((np.not_equal(*scales) & (integers != 0)).sum())
    moved = int((np.asarray(again.integers) != integers).sum())
    if others or moved:
        raise ValueError(
            f"the quantizer {quantizer.description} with scale_bits={quantizer.scale_bits} changes {moved:,} of its"
            f" {integers.size:,} integers, and the scale of {others:,}"
        )


def _regrouped(trits: Array, scales: Array, group: int, axis: int, shared: bool) -> Array:
    """Return the scale of every new group from the scale of every weight; for a group of zeros, the largest."""
    length, starts = trits.shape[axis], np.arange(0, trits.shape[axis], group)
    used = np.where(trits != 0, scales, np.float32(0))
    if shared:
        scale = used.max(keepdims=True)
    else:
        scale = np.maximum.reduceat(used, starts, axis)
        scale = np.where(scale == 0, np.maximum.reduceat(np.broadcast_to(scales, trits.shape), starts, axis), scale)
    conflicts = (trits != 0) & (used != (scale if shared else repeat_groups(scale, group, length, axis)))
    if conflicts.any():
        raise ValueError(
            f"{np.sum(conflicts):,} weights have another scale than the rest of their group of the quantizer"
        )
    return scale


def _latent(trits: Array, scale: Array, group: int, axis: int, factor: float) -> npt.NDArray[np.float32]:
    length, starts = trits.shape[axis], np.arange(0, trits.shape[axis], group)
    along = (-1, 1) if axis == -2 else (1, -1)
    members = np.minimum(group, length - starts).reshape(along)
    nonzeros = np.add.reduceat((trits != 0).astype(np.int64), starts, axis)
    zeros = members - nonzeros
    total = _totals(scale, (factor / members).astype(np.float32))
    # Multiples of this unit below 2²⁴ add up without rounding, and it is fine enough for both magnitudes.
    unit = np.minimum(np.spacing(total), np.spacing(scale) * 2.0**15).astype(np.float64)
    units, threshold = total / unit, np.floor(scale / 2 / unit)
    left_for_zeros = np.floor((units - nonzeros * (threshold + 1)) / np.maximum(zeros, 1))
    outwards = np.ceil((units - nonzeros * np.floor(_FAR * scale / unit)) / np.maximum(zeros, 1))
    inner = np.maximum(np.floor(_ZERO * scale / unit), outwards)
    inner = np.maximum(np.minimum(inner, np.minimum(threshold, left_for_zeros)), 0)
    inner = np.where(nonzeros == 0, np.floor(units / members), inner)
    outer, remainder = np.divmod(units - zeros * inner, np.where(nonzeros == 0, members, nonzeros))

    def spread(values: Array) -> Array:
        return repeat_groups(values, group, length, axis)

    outside = (trits != 0) | spread(nonzeros == 0)
    counts = np.add.reduceat(outside.astype(np.int64), starts, axis)
    rank = np.cumsum(outside, axis) - spread(np.cumsum(counts, axis) - counts)
    magnitude = np.where(trits != 0, spread(outer), spread(inner)) + (outside & (rank <= spread(remainder)))
    sign = np.where(trits != 0, trits, 1 - 2 * (np.arange(length) % 2).reshape(along))
    return (sign * magnitude * spread(unit)).astype(np.float32)


def _totals(scale: Array, factor: Array) -> Array:
    """Return for each scale a float32 total with total · factor == scale, if one of the five nearest qualifies."""
    nearest = (scale / factor.astype(np.float64)).astype(np.float32)
    total = nearest
    for direction in (np.float32(np.inf), np.float32(0)):
        moved = nearest
        for _ in range(2):
            moved = np.nextafter(moved, direction)
            total = np.where((total * factor != scale) & (moved * factor == scale), moved, total)
    return np.where(scale == 0, np.float32(0), total)


def _why_not(trits: Array, scale: Array, again: TernaryTensor, quantizer: Quantizer) -> str:
    bits = scale_bits(scale[scale > 0])
    if bits > quantizer.scale_bits:
        return f"its scales have {bits} significant bits: the quantizer keeps {quantizer.scale_bits}"
    scales, flips = int((again.scale != scale).sum()), int((again.trits != trits).sum())
    return (
        f"no weights give {scales} of its {scale.size} scales and {flips} of its {trits.size} trits with factor"
        f" {quantizer.factor:g}: the mean is s/{quantizer.factor:g}, and every nonzero lies above s/2"
    )
