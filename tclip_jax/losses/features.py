"""Distillation of hidden states inside the towers, and of the relations of queries, keys and values.

States are floats (B, T, D); student and teacher have the same number of tokens T. `valid` is a bool mask (B, T) of the
tokens that count; None if all count. All arithmetic is float32, no gradient reaches the teacher, and a loss is a
float32 scalar, 0 if no token is valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tclip_jax.losses.distillation import feature_distillation
from tclip_jax.losses.statistics import masked_rows, weighted_mean


def hidden_matching(
    student: jax.Array, teacher: jax.Array, kind: str = "mse", valid: jax.Array | None = None
) -> jax.Array:
    """Compute the distance between the hidden states of student and teacher.

        mse:    L = mean_n 1/D Σ_d (h^S_nd − h^T_nd)²
        cosine: L = mean_n (1 − cos(h^S_n, h^T_n))

    The mean runs over the valid tokens n of all samples. A few channels with large activations dominate mse, but not
    cosine.

    Args:
      student: states (B, T, D), projected to the teacher's width.
      teacher: states (B, T, D).
      kind: "mse" or "cosine".
      valid: bool (B, T), or None.

    Returns:
      The loss, a float32 scalar.

    Raises:
      ValueError: the shapes differ, or `kind` is unknown.

    Source: TinyBERT, arXiv 1909.10351, eq. 8 (mse).
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student states {student.shape} must be projected to the teacher's shape {teacher.shape}")
    tokens = None if valid is None else valid.reshape(-1)
    student, teacher = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (student, teacher))
    if kind == "cosine":
        # Invalid states become zero first: the derivative of their norm may be NaN.
        student, teacher = (_unit(masked_rows(x, tokens)) for x in (student, teacher))
    return feature_distillation(student, teacher, kind, tokens)


def relation_matching(student: jax.Array, teacher: jax.Array, heads: int, valid: jax.Array | None = None) -> jax.Array:
    """Compute the KL divergence of the student's relations between tokens from the teacher's.

        L = mean_n mean_h KL(R^T_nh ‖ R^S_nh),    R_h = softmax(A_h · A_hᵀ / √d)

    A is the queries, the keys or the values of one layer, split into `heads` relation heads A_h of d channels, whatever
    the attention heads are. The widths of student and teacher may therefore differ. n runs over the valid tokens of all
    samples; the softmax runs over the valid tokens of the sample.

    Args:
      student: queries, keys or values (B, T, D).
      teacher: the same of the teacher, (B, T, D').
      heads: number of relation heads.
      valid: bool (B, T), or None.

    Returns:
      The loss, a float32 scalar.

    Raises:
      ValueError: B or T differs, or `heads` does not divide a width.

    Source: MiniLMv2, arXiv 2012.15828, eq. 3–5; BitDistill.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"relations of {student.shape[1]} tokens cannot match those of {teacher.shape[1]}")
    ours = _log_relations(student, heads, valid)
    theirs = jax.lax.stop_gradient(_log_relations(teacher, heads, valid))
    divergence_BHT = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
    return weighted_mean(divergence_BHT.mean(axis=1).reshape(-1), None if valid is None else valid.reshape(-1))


def _log_relations(x_BTD: jax.Array, heads: int, valid: jax.Array | None) -> jax.Array:
    batch, tokens, width = x_BTD.shape
    if width % heads:
        raise ValueError(f"width {width} is not divisible by {heads} relation heads")
    x_BTHK = x_BTD.astype(jnp.float32).reshape(batch, tokens, heads, width // heads)
    if valid is not None:
        x_BTHK = jnp.where(valid[:, :, None, None], x_BTHK, 0)
    logits_BHTS = jnp.einsum("bthk,bshk->bhts", x_BTHK, x_BTHK, precision=jax.lax.Precision.HIGHEST)
    logits_BHTS *= (width // heads) ** -0.5
    if valid is not None:
        # -inf times a target of 0 would be NaN.
        logits_BHTS = jnp.where(valid[:, None, None, :], logits_BHTS, jnp.finfo(jnp.float32).min)
    return jax.nn.log_softmax(logits_BHTS, axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
