"""What happens to trits, scales and latent weights in a step: per layer, from two snapshots of the parameters."""

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

# |w| in units of its scale; the last bin holds all that is beyond.
LIMIT = 2**18
HISTOGRAM_EDGES = tuple(np.arange(0, 2.25, 0.125).tolist())


@functools.partial(jax.jit, static_argnums=(1, 2))
def trit_snapshot(params: Any, rules: TernaryRules, limit: int = LIMIT) -> dict[str, TernaryTensor]:
    """The trits and scales of every ternary parameter as it is now; stacked layers first, others as one layer.

    Of a layer of more than `limit` weights only every n-th output is looked at (of a table, every n-th row).
    """
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    seen = {}
    for path, leaf in leaves.items():
        quantizer = find_quantizer(path, rules) if path in TERNARIZABLE else None
        if quantizer:
            weight, axis = _layers(path, leaf), input_axis(path)
            alpha = _layers(path, leaves[f"{path}_scale"]) if quantizer.learned else None
            if quantizer.group != "tensor":
                stride = _stride(weight, limit)
                weight, alpha = _every(weight, stride, axis), None if alpha is None else _every(alpha, stride, axis)
            seen[path] = ternarize(weight, quantizer, axis, alpha)
    return seen


@functools.partial(jax.jit, static_argnums=(2, 3))
def trit_metrics(
    before: Mapping[str, TernaryTensor], params: Any, rules: TernaryRules, limit: int = LIMIT
) -> dict[str, Any]:
    """For each ternary parameter, arrays with one entry per layer, of the step between `before` and `params`.

    `zeros`: share of zero trits. `flips`: share of trits that changed. `scale`: mean scale. `drift`: mean |change| of
    the scales relative to that. `saturated`: share of latent weights beyond their scale, |w| > s. `histogram`: shares
    of |w| / s between `HISTOGRAM_EDGES` and beyond.
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
    """Every n-th entry of the axis that is not the input axis."""
    return x[..., ::stride] if axis == -2 else x[..., ::stride, :]


def _layers(path: str, leaf: jax.Array) -> jax.Array:
    return leaf if "/blocks/" in path else leaf.reshape(1, *matrix_shape(leaf.shape))


def _share(mask: jax.Array) -> jax.Array:
    return mask.astype(jnp.float32).mean(axis=(-1, -2))
