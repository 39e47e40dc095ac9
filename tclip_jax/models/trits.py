"""Metrics of trits, scales and latent weights per layer, from trit snapshots before and after a step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.parallel.mesh import constrain_replicated
from tclip_jax.parallel.sharding import path_of
from tclip_jax.ternary import TernaryTensor, ternarize
from tclip_jax.ternary.tensor import expand_scale

# Bins of |w| / scale; one more bin holds all larger values.
LIMIT = 2**18
HISTOGRAM_EDGES = tuple(np.arange(0, 2.25, 0.125).tolist())


@functools.partial(jax.jit, static_argnums=(1, 2))
def trit_snapshot(params: Any, rules: TernaryRules, limit: int = LIMIT) -> dict[str, TernaryTensor]:
    """Take a snapshot of the trits and scales of every ternary parameter; uniform kinds have no trits.

    Args:
      params: a parameter tree with latent weights.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      limit: the most weights of a layer. Of a larger layer only every n-th output is taken (of a table every n-th row),
        unless the whole matrix has one scale.

    Returns:
      Path -> trits (L, K, N) and their scales; L is 1 for a parameter without a layer axis.
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    snapshot = {}
    for path, leaf in leaves.items():
        quantizer = find_quantizer(path, rules) if path in TERNARIZABLE else None
        if quantizer and not quantizer.uniform:
            weight, axis = _layers(path, leaf), input_axis(path)
            alpha = _layers(path, leaves[f"{path}_scale"]) if quantizer.learned else None
            if quantizer.group != "tensor":
                stride = _stride(weight, limit)
                weight, alpha = _every(weight, stride, axis), None if alpha is None else _every(alpha, stride, axis)
            snapshot[path] = ternarize(weight, quantizer, axis, alpha)
    return snapshot


@functools.partial(jax.jit, static_argnums=(2, 3))
def trit_metrics(
    before: Mapping[str, TernaryTensor], params: Any, rules: TernaryRules, limit: int = LIMIT
) -> dict[str, Any]:
    """Compute metrics of each ternary parameter for the step from `before` to `params`.

    Args:
      before: snapshot before the step, from `trit_snapshot` with the same `rules` and `limit`.
      params: parameters after the step.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      limit: as in `trit_snapshot`.

    Returns:
      Path -> metrics, float32 with one entry per layer, fractions from 0 to 1 unless stated otherwise:
      `zeros`: zero trits. `flips`: trits that changed. `scale`: mean scale (absolute). `drift`: mean |change| of the
      scales,
      divided by their mean (relative). `saturated`: latent weights beyond their scale, |w| > s. `histogram` (L, bins):
      |w| / s between consecutive `HISTOGRAM_EDGES`, and beyond the last.
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    metrics = {}
    for path, now in trit_snapshot(params, rules, limit).items():
        was, weight = before[path], _layers(path, leaves[path])
        stride = -(-weight.shape[-3 - now.axis] // now.shape[-3 - now.axis])
        magnitude = jnp.abs(_every(weight, stride, now.axis))
        level = expand_scale(now.scale, now.group, magnitude.shape[now.axis], now.axis)
        within = [_share(magnitude < edge * level) for edge in HISTOGRAM_EDGES[1:]]
        cumulative = jnp.stack([jnp.zeros_like(within[0]), *within, jnp.ones_like(within[0])], axis=-1)
        mean_scale = now.scale.mean(axis=(-1, -2))
        metrics[path] = {
            "zeros": _share(now.trits == 0),
            "flips": _share(now.trits != was.trits),
            "scale": mean_scale,
            "drift": jnp.abs(now.scale - was.scale).mean(axis=(-1, -2)) / jnp.maximum(mean_scale, 1e-30),
            "saturated": _share(magnitude > level),
            "histogram": jnp.diff(cumulative, axis=-1),
        }
    return constrain_replicated(metrics)


def _stride(weight: jax.Array, limit: int) -> int:
    return -(-weight.shape[-1] * weight.shape[-2] // limit)


def _every(x: jax.Array, stride: int, axis: int) -> jax.Array:
    """Take every n-th entry of the output axis."""
    return x[..., ::stride] if axis == -2 else x[..., ::stride, :]


def _layers(path: str, leaf: jax.Array) -> jax.Array:
    return leaf if "/blocks/" in path else leaf.reshape(1, *matrix_shape(leaf.shape))


def _share(mask: jax.Array) -> jax.Array:
    return mask.astype(jnp.float32).mean(axis=(-1, -2))
