"""Fake quantization: quantized weights in the forward pass, straight-through gradients in the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tclip_jax.ternary.gathering import LEVELS, Placement, gather_ternary
from tclip_jax.ternary.quantizers import Quantizer, find_levels, group_members, group_totals
from tclip_jax.ternary.tensor import check_floating, expand_scale

# ParetoQ rounds 1.5 · clip(w / α, −0.99, 0.99): a weight above 0.99 · α is saturated.
_SEQ_INSIDE = 0.99


def fake_quantize(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int = -2,
    alpha: jax.Array | None = None,
    size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    placement: Placement | None = None,
) -> jax.Array:
    """Quantize and dequantize latent weights: ŵ = s · t, with a straight-through gradient. Zero trits give +0.0.

    Let g be the gradient with respect to ŵ, s the rounded scale and x = w / s.

    * factor, twn, least_squares: `w` gets g, without clipping. The scale is not differentiated (EdgeRazor).
    * lsq (arXiv 1902.08153, eq. 3 and 5): `w` gets g where |x| < 1, else 0. α gets Σ g · d / sqrt(n), where d is t − x
      if |x| < 1, else sign(w), and n is the number of weights that share α.
    * seq (the code of ParetoQ, arXiv 2502.02631), with x = w / (1.5 · s): `w` gets g where |x| ≤ 0.99, else 0. α gets
      Σ g · d / sqrt(n), where d is 2/3 · t − x if |x| ≤ 0.99, else sign(w), and n is the number of weights of the whole
      matrix.

    Args:
      w: latent weights, floats (..., K, N).
      quantizer: kind, group size and significant bits.
      axis: the input axis: −2 for a kernel, −1 for an embedding table.
      alpha: the learned α of the kinds lsq and seq, float32 in the shape of the scales.
      size: number of weights of the whole matrix, if `w` is only some of its rows; default K · N.
      dtype: dtype of the result; default that of `w`.
      placement: shardings of a matrix (K, N), whose trits and scales are gathered for the computation; None if the
        matrix is not sharded.

    Returns:
      ŵ in the shape of `w`.

    Raises:
      TypeError: the dtype of `w`, or `dtype`, is integer or bool.
      ValueError: `alpha` is None and the kind learns its scale.
    """
    dtype = jnp.dtype(w.dtype if dtype is None else dtype)
    check_floating("the weight", w.dtype)
    check_floating("the dtype of the weights", dtype)
    if not quantizer.learned:
        return _identity(w, quantizer, axis, dtype, placement)
    return _learned(w, alpha, quantizer, axis, size or w.shape[-1] * w.shape[-2], dtype, placement)


def _quantized(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int,
    dtype: jnp.dtype,
    placement: Placement | None,
    alpha: jax.Array | None = None,
) -> jax.Array:
    if placement is not None:
        return gather_ternary(w, quantizer, axis, alpha, placement, dtype).dequantize(dtype)
    *levels, group = find_levels(w, quantizer, axis, alpha)
    level, threshold = (expand_scale(each, group, w.shape[axis], axis) for each in checkpoint_name(levels, LEVELS))
    # jnp.where gives +0.0 for every zero trit; a product would also give −0.0.
    w32 = w.astype(jnp.float32)
    return jnp.where(jnp.abs(w32) > threshold, jnp.copysign(level, w32), 0.0).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _identity(
    w: jax.Array, quantizer: Quantizer, axis: int, dtype: jnp.dtype, placement: Placement | None
) -> jax.Array:
    return _quantized(w, quantizer, axis, dtype, placement)


def _identity_forward(
    w: jax.Array, quantizer: Quantizer, axis: int, dtype: jnp.dtype, placement: Placement | None
) -> tuple[jax.Array, jax.Array]:
    return _quantized(w, quantizer, axis, dtype, placement), jnp.zeros((), w.dtype)


def _identity_backward(
    quantizer: Quantizer,
    axis: int,
    dtype: jnp.dtype,
    placement: Placement | None,
    like: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array]:
    return (_stored(gradient.astype(like.dtype), placement),)


_identity.defvjp(_identity_forward, _identity_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _learned(
    w: jax.Array,
    alpha: jax.Array | None,
    quantizer: Quantizer,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> jax.Array:
    return _quantized(w, quantizer, axis, dtype, placement, alpha)


def _learned_forward(
    w: jax.Array,
    alpha: jax.Array,
    quantizer: Quantizer,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _quantized(w, quantizer, axis, dtype, placement, alpha), (w, alpha)


def _learned_backward(
    quantizer: Quantizer,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    placement: Placement | None,
    residuals: tuple[jax.Array, jax.Array],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    w, alpha = residuals
    scale, threshold, group = find_levels(w, quantizer, axis, alpha)
    level, threshold = (expand_scale(each, group, w.shape[axis], axis) for each in (scale, threshold))
    w32, g32 = w.astype(jnp.float32), _stored(gradient.astype(jnp.float32), placement)
    trits = jnp.sign(w32) * (jnp.abs(w32) > threshold)
    if quantizer.kind == "lsq":
        x = w32 / level
        inside, slope = jnp.abs(x) < 1, trits - x
        members = group_members(w.shape, quantizer, axis)
    else:
        x = w32 / (1.5 * level)
        inside, slope = jnp.abs(x) <= _SEQ_INSIDE, 2 / 3 * trits - x
        members = np.array(size)
    each = g32 * jnp.where(inside, slope, jnp.sign(w32))
    alpha_gradient = group_totals(each, quantizer, axis) * jnp.asarray(members**-0.5, jnp.float32)
    return jnp.where(inside, g32, 0).astype(w.dtype), alpha_gradient.astype(alpha.dtype)


_learned.defvjp(_learned_forward, _learned_backward)


def _stored(gradient: jax.Array, placement: Placement | None) -> jax.Array:
    return gradient if placement is None else placement.place_back(gradient)
