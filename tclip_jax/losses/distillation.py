"""Distillation losses between a student's embeddings and a frozen teacher's.

Where images are compared with texts of the same model, by `rows.compare`, student and teacher may differ in width;
`feature_distillation` wants the student projected to the teacher's width and normalised after that, and so does
CLIP-KD's ICL, which is `contrastive.info_nce` of a student's rows and a teacher's columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tclip_jax.losses.statistics import RowStats, masked_rows, weighted_mean


def crd(image: RowStats, text: RowStats) -> jax.Array:
    """Contrastive relational distillation: ½ [KL(teacher ‖ student) of image → text + of text → image].

    Source: CLIP-KD, arXiv 2307.12732, L_CRD.
    """
    return kl_mix(image, text, reverse=0)


def kl_mix(image: RowStats, text: RowStats, reverse: float = 0.5) -> jax.Array:
    """(1 − reverse) · KL(teacher ‖ student) + reverse · KL(student ‖ teacher), the mean of both directions.

    The forward divergence makes the student cover all that the teacher finds likely, the reverse one keeps it from what
    the teacher finds unlikely. Source: MiniLLM, arXiv 2306.08543, for the reverse. arXiv 2404.02657 weighs
    the two anew at every token; here the share is fixed.
    """

    def divergence(rows: RowStats) -> jax.Array:
        student, teacher = rows.soft["student"], rows.soft["teacher"]
        forward, backward = teacher["student"] - teacher["teacher"], student["teacher"] - student["student"]
        return weighted_mean((1 - reverse) * forward + reverse * backward, rows.mask)

    return (divergence(image) + divergence(text)) / 2


def open_clip_distillation(image: RowStats, text: RowStats) -> jax.Array:
    """The mean over both directions of the cross entropy between the teacher's and the student's affinities.

    Its gradient is that of `crd`; its value is larger by the teacher's entropy.
    Source: `distill_loss` of open_clip's DistillClipLoss.
    """
    image_to_text, text_to_image = (weighted_mean(rows.soft["teacher"]["student"], rows.mask) for rows in (image, text))
    return (image_to_text + text_to_image) / 2


def affinity_mimicking(image: RowStats, text: RowStats) -> jax.Array:
    """TinyCLIP's affinity mimicking: the sum, not the mean, of the two terms of `open_clip_distillation`.

    Source: arXiv 2309.12314, L_distill = L_I2T + L_T2I; the authors' training code then halves it.
    """
    return 2 * open_clip_distillation(image, text)


def feature_distillation(
    student: jax.Array, teacher: jax.Array, kind: str = "mse", weight: jax.Array | None = None
) -> jax.Array:
    """The distance of one modality's student embeddings (B, D) from the teacher's (B, D).

    `mse` is the mean over all B · D elements, as CLIP-KD computes L_FD (arXiv 2307.12732, weight 2000, image + text);
    `cosine` is the mean of 1 − cos = D/2 · mse. Raises ValueError for another kind or for different widths.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student embeddings {student.shape} must be projected to the teacher's shape {teacher.shape}")
    student, teacher = masked_rows(student, weight), jax.lax.stop_gradient(masked_rows(teacher, weight))
    if kind == "mse":
        return weighted_mean(jnp.mean((student - teacher) ** 2, axis=-1), weight)
    if kind == "cosine":
        return weighted_mean(1 - jnp.sum(student * teacher, axis=-1), weight)
    raise ValueError(f"feature distillation {kind!r} is unknown: use 'mse' or 'cosine'")
