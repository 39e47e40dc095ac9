"""The weights that training computes with: quantized forward, and what stands for their gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from tclip_jax.ternary.gathering import LEVELS, Placement, gather_ternary
from tclip_jax.ternary.quantizers import Quantizer, find_levels, group_members, group_totals
from tclip_jax.ternary.tensor import check_floating, expand_scale

# ParetoQ rounds clip(w/α, ±0.99) · 1.5: beyond this share of α a weight is saturated.
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
    """ŵ = scale · trit of the latent weights `w` (..., K, N); zeros are +0.0.

    The gradient of a kind whose scale is a function of `w` is the identity (straight-through, no clipping), and its
    scale is not differentiated (EdgeRazor). With g the gradient of ŵ, s the rounded scale and x = w / s:

    * lsq (arXiv 1902.08153, eq. 3 and 5): w gets g where |x| < 1, else 0; α gets Σ g · (t − x where |x| < 1, else
      sign(w)) / sqrt(n), n being the weights that share it.
    * seq (ParetoQ's code, arXiv 2502.02631), x = w / (1.5 · s): w gets g where |x| ≤ 0.99, else 0; α gets
      Σ g · (2/3 · t − x where |x| ≤ 0.99, else sign(w)) / sqrt(n), n being the weights of the whole matrix.

    Args:
      w: latent weights.
      quantizer: kind and granularity.
      axis: the input axis, −1 or −2.
      alpha: the learned α of the kinds lsq and seq.
      size: weights of the whole matrix, where `w` is a part of its rows; default K · N.
      dtype: of ŵ; default that of `w`.
      placement: of a matrix (K, N) that is stored sharded: its trits and scales go where they are used.

    Raises:
      TypeError: weights, or a `dtype`, that are integers or bools.
      ValueError: a kind that learns its scale, without it.
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
    # Selecting, not multiplying, gives +0.0 for every zero trit.
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
