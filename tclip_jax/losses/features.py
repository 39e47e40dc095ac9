"""Distillation of what is inside the towers: hidden states, and the relations of queries, keys and values.

States are (B, T, D) floats of any dtype; T must be the same in student and teacher. `valid` is a bool (B, T) mask of
the tokens that count, None for all. All math is float32, no gradient reaches the teacher, and a loss is a float32
scalar, 0 where nothing is valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tclip_jax.losses.distillation import feature_distillation
from tclip_jax.losses.statistics import masked_rows, weighted_mean


def hidden_matching(
    student: jax.Array, teacher: jax.Array, kind: str = "mse", valid: jax.Array | None = None
) -> jax.Array:
    """The distance of a student's hidden states, projected to the teacher's width, from the teacher's.

    `mse` is the mean over tokens and channels of the squared difference (TinyBERT, arXiv 1909.10351, eq. 8); `cosine`
    is the mean over tokens of 1 − cos, which a few channels of large activations do not rule. Raises ValueError for
    another kind or for different shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student states {student.shape} must be projected to the teacher's shape {teacher.shape}")
    tokens = None if valid is None else valid.reshape(-1)
    student, teacher = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (student, teacher))
    if kind == "cosine":
        # Without the invalid first: the derivative of their length may be NaN.
        student, teacher = (_unit(masked_rows(x, tokens)) for x in (student, teacher))
    return feature_distillation(student, teacher, kind, tokens)


def relation_matching(student: jax.Array, teacher: jax.Array, heads: int, valid: jax.Array | None = None) -> jax.Array:
    """KL(teacher ‖ student) of the relations softmax(A · Aᵀ / √d) between tokens, A being queries, keys or values.

    The mean over samples, `heads` relation heads (into which each model's own width is split, whatever its attention
    heads are, so widths may differ) and valid tokens. Source: MiniLMv2, arXiv 2012.15828, eq. 3–5; BitDistill.

    Raises:
      ValueError: different numbers of tokens, or a width that `heads` does not divide.
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
        # Not -inf: its product with a target of 0 would be NaN.
        logits_BHTS = jnp.where(valid[:, None, None, :], logits_BHTS, jnp.finfo(jnp.float32).min)
    return jax.nn.log_softmax(logits_BHTS, axis=-1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
