"""Recover trits and scales from floats that equal scale · trit, with unknown groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, input_axis, matrix_shape
from tclip_jax.ternary import TernaryTensor

Array = npt.NDArray[Any]

# Group sizes to try in addition to the divisors, 32 or more, of the number of inputs; their last group may be short.
_GROUPS = (1024, 512, 256, 128, 64, 32)
_SAMPLE = 64  # outputs to test first, so that float weights are refused quickly


class NotTernaryError(ValueError):
    """Weights are not scale · trit. The message names the first group that fails, and the fraction that fits."""


def recover_ternary(w: Any, axis: int = -2) -> TernaryTensor:
    """Recover the trits and scales of weights that equal scale · trit, with the largest possible groups.

    A group size is accepted only if scale · trit equals `w` in every element, in float32. float16 and bfloat16
    are converted exactly. −0 equals +0.

    Args:
      w: floats (K, N) or (L, K, N), lazy or not; one layer at a time is in memory.
      axis: the input axis, −1 or −2.

    Returns:
      int8 trits and float32 scales in NumPy. There is one scale for each layer if all its weights share one, else one
      for each `group` inputs of each output; the scale of a group of zeros is 0.

    Raises:
      NotTernaryError: no group size fits; the message describes the best one.
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
    """Apply `recover_ternary` to the parameter at `path`; the patch embedding is reshaped to a matrix."""
    if path == PATCH_EMBEDDING:
        weight = np.asarray(weight).reshape(matrix_shape(weight.shape))
    return recover_ternary(weight, input_axis(path))


def scale_bits(scale: npt.ArrayLike) -> int:
    """Return the largest number of significant bits, 1 to 24, of float32 scales; bfloat16 holds 8, float16 holds 11."""
    mantissa = np.asarray(scale, np.float32).view(np.uint32) & 0x7FFFFF | 0x800000
    return 24 - int(np.log2((mantissa & -mantissa.astype(np.int64)).min(initial=0x800000)))


def repeat_groups(values: Array, group: int, length: int, axis: int) -> Array:
    """Repeat the value of each group for its members, to `length` entries along `axis`, −1 or −2, of a matrix."""
    repeated = np.repeat(values, group, axis)
    return repeated[:, :length] if axis == -1 else repeated[:length]


def _candidates(length: int) -> list[int]:
    divisors = (size for size in range(min(_GROUPS), length) if length % size == 0)
    return sorted({length, *divisors, *(size for size in _GROUPS if size < length)}, reverse=True)


def _split(w: Array, group: int, axis: int) -> tuple[Array, Array, Array]:
    """Return trits, the largest magnitude of each group, and a mask of the groups that are not scale · trit."""
    starts = range(0, w.shape[axis], group)
    scale = np.maximum.reduceat(np.abs(w), starts, axis)
    trits = (w > 0).astype(np.int8) - (w < 0).astype(np.int8)
    with np.errstate(invalid="ignore"):
        mismatches = trits * repeat_groups(scale, group, w.shape[axis], axis) != w
    return trits, scale, np.logical_or.reduceat(mismatches, starts, axis) | ~np.isfinite(scale)


def _shared(scale: Array) -> Array:
    """Return one scale for each layer (L, 1, 1) if the nonzero scales of each layer are equal, else `scale`."""
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
        f" where one scale allows 1; groups of {group} fit in {1 - misfits.mean():.1%} of the tested groups"
    )
