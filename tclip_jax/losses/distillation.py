"""Distillation losses between a student's embeddings and a frozen teacher's.

The conventions are those of `contrastive`; no gradient reaches the teacher. Student and teacher may differ in width
where images are compared with texts of the same model (`crd`, `open_clip_distillation`, `affinity_mimicking`);
`feature_distillation` and `icl` want the student projected to the teacher's width and normalised after that.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tclip_jax.losses.contrastive import cross_entropy, existing_positives, existing_rows, similarity, weighted_mean


def _log_affinities(image: jax.Array, text: jax.Array, scale: ArrayLike, weight: jax.Array | None = None) -> jax.Array:
    """Log probabilities (2, B, B): of each text given an image [0] and of each image given a text [1]."""
    logits = jnp.stack([similarity(image, text, scale, weight), similarity(text, image, scale, weight)])
    return jax.nn.log_softmax(logits, axis=-1)


def crd(
    student_image: jax.Array,
    student_text: jax.Array,
    student_scale: ArrayLike,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    teacher_scale: ArrayLike,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Contrastive relational distillation: ½ [KL(teacher ‖ student) of image → text + of text → image].

    Source: CLIP-KD, arXiv 2307.12732, L_CRD.
    """
    student = _log_affinities(student_image, student_text, student_scale, weight)
    teacher = jax.lax.stop_gradient(_log_affinities(teacher_image, teacher_text, teacher_scale, weight))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return weighted_mean(divergence.mean(axis=0), weight)


def kl_mix(
    student_image: jax.Array,
    student_text: jax.Array,
    student_scale: ArrayLike,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    teacher_scale: ArrayLike,
    weight: jax.Array | None = None,
    reverse: float = 0.5,
) -> jax.Array:
    """(1 − reverse) · KL(teacher ‖ student) + reverse · KL(student ‖ teacher) of the affinities of `crd`.

    The forward divergence makes the student cover all that the teacher finds likely, the reverse one keeps it from what
    the teacher finds unlikely. Source: MiniLLM, arXiv 2306.08543, for the reverse; a fixed mix as in arXiv 2404.02657.
    """
    student = _log_affinities(student_image, student_text, student_scale, weight)
    teacher = jax.lax.stop_gradient(_log_affinities(teacher_image, teacher_text, teacher_scale, weight))
    mix = (1 - reverse) * jnp.exp(teacher) - reverse * jnp.exp(student)
    divergence = jnp.sum(mix * (teacher - student), axis=-1)
    return weighted_mean(divergence.mean(axis=0), weight)


def open_clip_distillation(
    student_image: jax.Array,
    student_text: jax.Array,
    student_scale: ArrayLike,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    teacher_scale: ArrayLike,
    weight: jax.Array | None = None,
) -> jax.Array:
    """The mean over both directions of the cross entropy between the teacher's and the student's affinities.

    Its gradient is that of `crd`; its value is larger by the teacher's entropy.
    Source: `distill_loss` of open_clip's DistillClipLoss.
    """
    student = _log_affinities(student_image, student_text, student_scale, weight)
    teacher = jax.lax.stop_gradient(_log_affinities(teacher_image, teacher_text, teacher_scale, weight))
    soft_cross_entropy = -jnp.sum(jnp.exp(teacher) * student, axis=-1)
    return weighted_mean(soft_cross_entropy.mean(axis=0), weight)


def affinity_mimicking(
    student_image: jax.Array,
    student_text: jax.Array,
    student_scale: ArrayLike,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    teacher_scale: ArrayLike,
    weight: jax.Array | None = None,
) -> jax.Array:
    """TinyCLIP's affinity mimicking: the sum, not the mean, of the two terms of `open_clip_distillation`.

    Source: arXiv 2309.12314, L_distill = L_I2T + L_T2I; the authors' training code then halves it.
    """
    teacher = (teacher_image, teacher_text, teacher_scale)
    return 2 * open_clip_distillation(student_image, student_text, student_scale, *teacher, weight)


def feature_distillation(
    student: jax.Array, teacher: jax.Array, kind: str = "mse", weight: jax.Array | None = None
) -> jax.Array:
    """The distance of one modality's student embeddings (B, D) from the teacher's (B, D).

    `mse` is the mean over all B · D elements, as CLIP-KD computes L_FD (arXiv 2307.12732, weight 2000, image + text);
    `cosine` is the mean of 1 − cos = D/2 · mse. Raises ValueError for another kind or for different widths.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student embeddings {student.shape} must be projected to the teacher's shape {teacher.shape}")
    student, teacher = existing_rows(student, weight), jax.lax.stop_gradient(existing_rows(teacher, weight))
    if kind == "mse":
        return weighted_mean(jnp.mean((student - teacher) ** 2, axis=-1), weight)
    if kind == "cosine":
        return weighted_mean(1 - jnp.sum(student * teacher, axis=-1), weight)
    raise ValueError(f"feature distillation {kind!r} is unknown: use 'mse' or 'cosine'")


def icl(
    student_image: jax.Array,
    student_text: jax.Array,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    scale: ArrayLike,
    positives: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> jax.Array:
    """Interactive contrastive learning: student images among teacher texts, and student texts among teacher images.

    ½ [CE(scale · v′ · Tᵀ) + CE(scale · t′ · Vᵀ)] against `positives`, with student v′, t′ and teacher V, T.
    Source: CLIP-KD, arXiv 2307.12732, L_ICL; its code learns `scale` itself, not its log, from 2.659.
    """
    teacher_image, teacher_text = jax.lax.stop_gradient((teacher_image, teacher_text))
    positives = existing_positives(positives, weight, len(student_image))
    image_to_text = cross_entropy(student_image, teacher_text, scale, positives, weight)
    text_to_image = cross_entropy(student_text, teacher_image, scale, positives.T, weight)
    return (image_to_text + text_to_image) / 2
