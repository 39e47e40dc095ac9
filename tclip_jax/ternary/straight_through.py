"""Fake quantization: quantized weights in the forward pass, straight-through gradients in the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tclip_jax.ternary.gathering import LEVELS, Placement, gather_ternary
from tclip_jax.ternary.quantizers import Quantizer, find_levels
from tclip_jax.ternary.tensor import check_floating


def fake_quantize(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int = -2,
    alpha: jax.Array | None = None,
    size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    placement: Placement | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Quantize and dequantize latent weights: ŵ = s · t, with a straight-through gradient. Zero trits give +0.0.

    Let g be the gradient with respect to ŵ, s the rounded scale and x = w / s.

    * factor, twn, least_squares: `w` gets g, without clipping. The scale is not differentiated (EdgeRazor).
    * lsq (arXiv 1902.08153, eq. 3 and 5): `w` gets g where |x| < 1, else 0. α gets Σ g · d / sqrt(n), where d is t − x
      if |x| < 1, else sign(w), and n is the number of weights that share α.
    * seq (the code of ParetoQ, arXiv 2502.02631), with x = w / (1.5 · s): `w` gets g where |x| ≤ 0.99, else 0. α gets
      Σ g · d / sqrt(n), where d is 2/3 · t − x if |x| ≤ 0.99, else sign(w), and n is the number of weights of the whole
      matrix.
    * The kind of a plug-in: its own gradient, or g.

    Args:
      w: latent weights, floats (..., K, N).
      quantizer: kind, group size and significant bits.
      axis: the input axis: −2 for a kernel, −1 for an embedding table.
      alpha: the learned α of the kinds that learn their scale, float32 in the shape of the scales.
      size: number of weights of the whole matrix, if `w` is only some of its rows; default K · N.
      dtype: dtype of the result; default that of `w`.
      placement: shardings of a matrix (K, N), whose trits and scales are gathered for the computation; None if the
        matrix is not sharded.
      key: PRNG key of the kinds that draw random numbers; None makes them deterministic.

    Returns:
      ŵ in the shape of `w`.

    Raises:
      TypeError: the dtype of `w`, or `dtype`, is integer or bool.
      ValueError: as `find_levels`.
    """
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    check_floating("the weight", w.dtype)
    check_floating("the dtype of the weights", dtype)
    if quantizer.rule.gradient is None:
        return _identity(w, key, quantizer, axis, dtype, placement)
    return _with_gradient(w, alpha, key, quantizer, axis, size or w.shape[-1] * w.shape[-2], dtype, placement)


def _quantized(
    w: jax.Array,
    alpha: jax.Array | None,
    key: jax.Array | None,
    quantizer: Quantizer,
    axis: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> jax.Array:
    if placement is not None:
        return gather_ternary(w, quantizer, axis, alpha, key, placement, dtype).dequantize(dtype)
    levels = find_levels(w, quantizer, axis, alpha, key)
    levels = levels._replace(scale=checkpoint_name(levels.scale, LEVELS))
    if levels.threshold.size < w.size:  # one threshold per weight is computed again in the backward pass
        levels = levels._replace(threshold=checkpoint_name(levels.threshold, LEVELS))
    level, threshold = levels.expanded(w.shape[axis], axis)
    # jnp.where gives +0.0 for every zero trit; a product would also give −0.0.
    w32 = w.astype(jnp.float32)
    return jnp.where(jnp.abs(w32) > threshold, jnp.copysign(level, w32), 0.0).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _identity(
    w: jax.Array,
    key: jax.Array | None,
    quantizer: Quantizer,
    axis: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> jax.Array:
    return _quantized(w, None, key, quantizer, axis, dtype, placement)


def _identity_forward(w: jax.Array, key: jax.Array | None, *static: Any) -> tuple[jax.Array, jax.Array]:
    return _identity(w, key, *static), jnp.zeros((), w.dtype)


def _identity_backward(
    quantizer: Quantizer,
    axis: int,
    dtype: jnp.dtype,
    placement: Placement | None,
    like: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    return _stored(gradient.astype(like.dtype), placement), None


_identity.defvjp(_identity_forward, _identity_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _with_gradient(
    w: jax.Array,
    alpha: jax.Array | None,
    key: jax.Array | None,
    quantizer: Quantizer,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> jax.Array:
    return _quantized(w, alpha, key, quantizer, axis, dtype, placement)


def _with_gradient_forward(
    w: jax.Array, alpha: jax.Array | None, key: jax.Array | None, *static: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None, jax.Array | None]]:
    return _with_gradient(w, alpha, key, *static), (w, alpha, key)


def _with_gradient_backward(
    quantizer: Quantizer,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    placement: Placement | None,
    residuals: tuple[jax.Array, jax.Array | None, jax.Array | None],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array | None, None]:
    w, alpha, key = residuals
    levels = find_levels(w, quantizer, axis, alpha, key).expanded(w.shape[axis], axis)
    w32, g32 = w.astype(jnp.float32), _stored(gradient.astype(jnp.float32), placement)
    rule = quantizer.rule
    assert rule.gradient is not None
    gradients = rule.gradient(g32, w32, *levels, quantizer, axis, size)
    if alpha is None:
        return gradients.astype(w.dtype), None, None
    to_w, to_alpha = gradients
    return to_w.astype(w.dtype), to_alpha.astype(alpha.dtype), None


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def _stored(gradient: jax.Array, placement: Placement | None) -> jax.Array:
    return gradient if placement is None else placement.place_back(gradient)
