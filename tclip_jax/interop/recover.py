"""Trits and scales out of floats that are scale · trit, with nothing known about the groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, input_axis, matrix_shape
from tclip_jax.ternary import TernaryTensor

Array = npt.NDArray[Any]

# Tried beside the divisors of the input width from 32 on: with these the last group of a row may be short.
_GROUPS = (1024, 512, 256, 128, 64, 32)
_SAMPLE = 64  # outputs that are tried first, so that float weights are refused after a glance


class NotTernaryError(ValueError):
    """Weights that are no scale · trit: the first group that is none, and for how many of the others it holds."""


def recover_ternary(w: Any, axis: int = -2) -> TernaryTensor:
    """The trits and scales of weights that are exactly scale · trit, in the largest groups for which they are.

    The search is the proof: a group size is taken only if trits · scales equals `w` in every number (float32, in which
    float16 and bfloat16 are exact; −0 equals +0).

    Args:
      w: floats (K, N), or (L, K, N) of which one layer at a time is in memory; lazy arrays too.
      axis: the input axis, −1 or −2.

    Returns:
      int8 trits and float32 scales, NumPy: one scale for all (of a layer) if that holds, else one for each `group`
      inputs of an output; 0 for a group of zeros.

    Raises:
      NotTernaryError: of the nearest group size.
    """
    stacked = len(w.shape) == 3
    layers = [w[i] for i in range(w.shape[0])] if stacked else [w]
    first = np.asarray(layers[0], np.float32)
    nearest, best = NotTernaryError("it holds no weights"), -1.0
    for group in _candidates(w.shape[axis]):
        trits, scales = np.empty((len(layers), *first.shape), np.int8), []
        for i, layer in enumerate(layers):
            values = np.asarray(layer, np.float32) if i else first
            sample = values[:_SAMPLE] if axis == -1 else values[:, :_SAMPLE]
            _, scale, misfits = _split(sample, group, axis)
            if not misfits.any():
                trits[i], scale, misfits = _split(values, group, axis)
            if misfits.any():
                if i + 1 - misfits.mean() > best:
                    best = i + 1 - misfits.mean()
                    nearest = _explained(values, misfits, group, axis, f"layer {i}, " if stacked else "")
                break
            scales.append(scale)
        else:
            scale = _shared(np.stack(scales)) if group == w.shape[axis] else np.stack(scales)
            parts: tuple[Any, Any] = (trits, scale) if stacked else (trits[0], scale[0])
            return TernaryTensor(parts[0], parts[1], group, axis)
    raise nearest


def recover_parameter(path: str, weight: Any) -> TernaryTensor:
    """As `recover_ternary` of the parameter at `path`, the patch embedding as the matrix that it is."""
    if path == PATCH_EMBEDDING:
        weight = np.asarray(weight).reshape(matrix_shape(weight.shape))
    return recover_ternary(weight, input_axis(path))


def scale_bits(scale: npt.ArrayLike) -> int:
    """The most significant bits that one of the float32 scales has, at least 1: 8 fit bfloat16, 11 float16."""
    mantissa = np.asarray(scale, np.float32).view(np.uint32) & 0x7FFFFF | 0x800000
    return 24 - int(np.log2((mantissa & -mantissa.astype(np.int64)).min(initial=0x800000)))


def repeat_groups(values: Array, group: int, length: int, axis: int) -> Array:
    """The value of each group for each of its members: `length` entries along `axis`, −1 or −2 of two."""
    repeated = np.repeat(values, group, axis)
    return repeated[:, :length] if axis == -1 else repeated[:length]


def _candidates(length: int) -> list[int]:
    divisors = (size for size in range(min(_GROUPS), length) if length % size == 0)
    return sorted({length, *divisors, *(size for size in _GROUPS if size < length)}, reverse=True)


def _split(w: Array, group: int, axis: int) -> tuple[Array, Array, Array]:
    """Trits, the largest magnitude of each group, and which groups are not those trits times that."""
    starts = range(0, w.shape[axis], group)
    scale = np.maximum.reduceat(np.abs(w), starts, axis)
    trits = (w > 0).astype(np.int8) - (w < 0).astype(np.int8)
    with np.errstate(invalid="ignore"):
        wrong = trits * repeat_groups(scale, group, w.shape[axis], axis) != w
    return trits, scale, np.logical_or.reduceat(wrong, starts, axis) | ~np.isfinite(scale)


def _shared(scale: Array) -> Array:
    """One scale for each layer (L, 1, 1) where all outputs of a layer have the same, or none because they are zero."""
    largest = scale.max(axis=(1, 2), keepdims=True)
    return largest if ((scale == largest) | (scale == 0)).all() else scale


def _explained(w: Array, misfits: Array, group: int, axis: int, layer: str) -> NotTernaryError:
    index = tuple(np.argwhere(misfits)[0])
    start, output = int(index[axis]) * group, int(index[-3 - axis])
    row = (w[output] if axis == -1 else w[:, output])[start : start + group]
    magnitudes = np.unique(np.abs(row[row != 0]))
    listed = ", ".join(f"{value:.9g}" for value in magnitudes[:3]) + (", …" if len(magnitudes) > 3 else "")
    return NotTernaryError(
        f"{layer}inputs {start}–{start + len(row) - 1} of output {output} have {len(magnitudes)} magnitudes ({listed})"
        f" where one scale allows 1; groups of {group} fit in {1 - misfits.mean():.1%} of those looked at"
    )
