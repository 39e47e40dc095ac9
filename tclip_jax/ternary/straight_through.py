"""Fake quantization: quantized weights in the forward pass, straight-through or soft gradients in the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tclip_jax.ternary.gathering import LEVELS, Placement, gather_quantized
from tclip_jax.ternary.quantizers import Quantizer, find_levels
from tclip_jax.ternary.sums import halving_sum
from tclip_jax.ternary.tensor import check_floating
from tclip_jax.ternary.uniform import largest_integer, round_to_integers


@jax.named_scope("quantize")
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
    """Quantize and dequantize latent weights: ŵ = s · t or s · q, with a straight-through gradient. Zeros are +0.0.

    Let g be the gradient with respect to ŵ, s the rounded scale and x = w / s.

    * factor, twn, least_squares, sherry, uniform: `w` gets g, without clipping. The scale is not differentiated
      (EdgeRazor).
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


def soft_quantize(
    w: jax.Array, quantizer: Quantizer, temperature: jax.Array, axis: int = -2, key: jax.Array | None = None
) -> jax.Array:
    """Quantize latent weights softly: the expectation of the trit under a softmax of temperature τ; hard for τ = 0.

        ŵ = s · Σ_t t · p_t,    p_t ∝ exp(2 · (t · x − δ · |t|) / τ),    x = w / s, δ = Δ / s, t ∈ {−1, 0, 1}

    For Δ = s/2 the exponent is −(x − t)² / τ up to a constant. For τ → 0 the soft weights become the hard ones. `w`
    gets the gradient of this function with s and Δ constant. For τ = 0 bits and gradient are those of `fake_quantize`.

    Args:
      w: latent weights, floats (..., K, N).
      quantizer: of a kind whose scale is not learned, and whose threshold is that of a group.
      temperature: τ, a scalar, at least 0.
      axis: the input axis: −2 for a kernel, −1 for an embedding table.
      key: PRNG key of the kinds that draw random numbers; None makes them deterministic.

    Returns:
      ŵ in the shape and dtype of `w`.

    Raises:
      TypeError, ValueError: as `find_levels`.
      ValueError: every weight has its own threshold, which for τ → 0 would leave those that it drops at s/2.

    Source: Hestia, arXiv 2601.20745, and its code, where s is the mean of |w| and has a gradient. The temperature
    here is the same for all tensors; Hestia's depends on the trace of their Hessians.
    """
    if quantizer.threshold_per_weight:
        raise ValueError(f"the quantizer {quantizer.kind} has a threshold per weight: soft trits need one per group")
    hard = fake_quantize(w, quantizer, axis, key=key)
    scale, threshold = find_levels(jax.lax.stop_gradient(w), quantizer, axis, key=key).expanded(w.shape[axis], axis)
    unit = jnp.where(scale > 0, scale, 1.0)  # a group of zeros stays zero
    sharpness = 2 / jnp.where(temperature > 0, temperature, 1.0)
    x, delta = w.astype(jnp.float32) / unit, threshold / unit
    up, down = sharpness * (x - delta), sharpness * (-x - delta)
    top = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(up, down), 0))
    plus, minus, zero = jnp.exp(up - top), jnp.exp(down - top), jnp.exp(-top)
    soft = scale * (plus - minus) / (plus + minus + zero)
    return jnp.where(temperature > 0, soft.astype(w.dtype), hard)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def dead_zone_bias(w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None) -> jax.Array:
    """Compute the bias that dead-zone weights make of themselves: λ · Σ_k w_kn over the weights whose trit is 0.

    Such weights get the gradient of the layer's bias too, times λ, which moves them out of the dead zone. The sum has a
    fixed order, and the result has 16 significant bits, so that it is bit-identical under jit, scan and sharding, and
    no compiler fuses the product with the addition to the layer's bias. At packing it folds into that bias.

    Args:
      w: latent weights, floats (..., K, N).
      quantizer: kind and group size, and λ, its `dead_zone_bias`.
      axis: the input axis of a kernel, −2.
      alpha: the learned α of the kinds that learn their scale; it gets no gradient.

    Returns:
      float32 (..., N).

    Source: Tequila, arXiv 2509.23809; UltraQuantV2 of its code.
    """
    total = halving_sum(jnp.where(_dead(w, quantizer, axis, alpha), w.astype(jnp.float32), 0), axis).squeeze(axis)
    return jax.lax.reduce_precision(jnp.float32(quantizer.dead_zone_bias) * total, 8, 15)


def _dead(w: jax.Array, quantizer: Quantizer, axis: int, alpha: jax.Array | None) -> jax.Array:
    _, threshold = find_levels(w, quantizer, axis, alpha).expanded(w.shape[axis], axis)
    return jnp.abs(w.astype(jnp.float32)) <= threshold


def _dead_forward(
    w: jax.Array, quantizer: Quantizer, axis: int, alpha: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    return dead_zone_bias(w, quantizer, axis, alpha), (w, alpha)


def _dead_backward(
    quantizer: Quantizer, axis: int, kept: tuple[jax.Array, jax.Array | None], gradient: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    w, alpha = kept
    each = jnp.expand_dims(quantizer.dead_zone_bias * gradient, axis)
    to_w = jnp.where(_dead(w, quantizer, axis, alpha), each, 0).astype(w.dtype)
    return to_w, None if alpha is None else jnp.zeros_like(alpha)


dead_zone_bias.defvjp(_dead_forward, _dead_backward)


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
        return gather_quantized(w, quantizer, axis, alpha, key, placement, dtype)
    levels = find_levels(w, quantizer, axis, alpha, key)
    levels = levels._replace(scale=checkpoint_name(levels.scale, LEVELS))
    if levels.threshold.size < w.size:  # one threshold per weight is computed again in the backward pass
        levels = levels._replace(threshold=checkpoint_name(levels.threshold, LEVELS))
    level, threshold = levels.expanded(w.shape[axis], axis)
    if quantizer.uniform:
        return (level * round_to_integers(w, level, largest_integer(quantizer.bits))).astype(dtype)
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
