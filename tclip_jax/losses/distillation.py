"""Distillation losses between the embeddings of a student and of a frozen teacher.

The losses of affinities compare each model's images with its own texts by `statistics.compare`, so the widths of both
models may differ. `feature_distillation` needs student embeddings that are projected to the teacher's width and then
normalised. CLIP-KD's ICL needs that too; it is `contrastive.info_nce` with rows of the student and columns of the
teacher.

Notation: p^S_i and p^T_i are the softmax over all texts of the student's and of the teacher's logits of image i; for
text → image, images and texts are exchanged. Each model has its own logit scale. Means run over the samples that are
not masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tclip_jax.losses.statistics import RowStats, masked_rows, weighted_mean


def crd(image: RowStats, text: RowStats) -> jax.Array:
    """Compute CLIP-KD's contrastive relational distillation: KL(teacher ‖ student) of the affinities.

        L = ½ [mean_i KL(p^T_i ‖ p^S_i) + the same for text → image]

    Args:
      image: statistics of each image against all texts, (B,), of student and teacher.
      text: statistics of each text against all images, (B,), of student and teacher.

    Returns:
      The loss, a float32 scalar.

    Source: L_CRD of CLIP-KD, arXiv 2307.12732.
    """
    return kl_mix(image, text, reverse=0)


def kl_mix(image: RowStats, text: RowStats, reverse: float = 0.5) -> jax.Array:
    """Compute a mix of the forward and the reverse KL divergence between the affinities of student and teacher.

        L = ½ [mean_i ((1 − r) · KL(p^T_i ‖ p^S_i) + r · KL(p^S_i ‖ p^T_i)) + the same for text → image]

    The forward divergence makes the student cover everything that is likely for the teacher. The reverse divergence
    keeps it from what is unlikely for the teacher.

    Args:
      image: statistics of each image against all texts, (B,), of student and teacher.
      text: statistics of each text against all images, (B,), of student and teacher.
      reverse: r, the fraction of the reverse divergence, from 0 (`crd`) to 1.

    Returns:
      The loss, a float32 scalar.

    Source: MiniLLM, arXiv 2306.08543, for the reverse divergence. arXiv 2404.02657 adapts the weights of both at every
    token; here they are fixed.
    """

    def divergence(rows: RowStats) -> jax.Array:
        student, teacher = rows.soft["student"], rows.soft["teacher"]
        forward, backward = teacher["student"] - teacher["teacher"], student["teacher"] - student["student"]
        return weighted_mean((1 - reverse) * forward + reverse * backward, rows.mask)

    return (divergence(image) + divergence(text)) / 2


def open_clip_distillation(image: RowStats, text: RowStats) -> jax.Array:
    """Compute the cross entropy between the affinities of teacher and student, the mean of both directions.

        L = ½ [mean_i −Σ_j p^T_ij · log p^S_ij + the same for text → image]

    The gradient is that of `crd`. The value is larger by the entropy of the teacher's affinities.

    Args:
      image: statistics of each image against all texts, (B,), of student and teacher.
      text: statistics of each text against all images, (B,), of student and teacher.

    Returns:
      The loss, a float32 scalar.

    Source: `distill_loss` of open_clip's DistillClipLoss.
    """
    image_to_text, text_to_image = (weighted_mean(rows.soft["teacher"]["student"], rows.mask) for rows in (image, text))
    return (image_to_text + text_to_image) / 2


def affinity_mimicking(image: RowStats, text: RowStats) -> jax.Array:
    """Compute TinyCLIP's affinity mimicking: `open_clip_distillation` with the sum of both directions, not the mean.

        L = L_I2T + L_T2I = mean_i −Σ_j p^T_ij · log p^S_ij + the same for text → image

    Args:
      image: statistics of each image against all texts, (B,), of student and teacher.
      text: statistics of each text against all images, (B,), of student and teacher.

    Returns:
      The loss, a float32 scalar.

    Source: L_distill of TinyCLIP, arXiv 2309.12314. The authors' training code then halves it.
    """
    return 2 * open_clip_distillation(image, text)


def feature_distillation(
    student: jax.Array, teacher: jax.Array, kind: str = "mse", weight: jax.Array | None = None
) -> jax.Array:
    """Compute the distance between the embeddings of student and teacher for one modality.

        mse:    L = mean_i 1/D Σ_d (x^S_id − x^T_id)²
        cosine: L = mean_i (1 − ⟨x^S_i, x^T_i⟩) = D/2 · mse

    No gradient reaches the teacher.

    Args:
      student: L2-normalised embeddings (B, D), projected to the teacher's width.
      teacher: L2-normalised embeddings (B, D).
      kind: "mse" or "cosine".
      weight: (B,), 0 for a masked sample; None if no sample is masked.

    Returns:
      The loss, a float32 scalar.

    Raises:
      ValueError: the shapes differ, or `kind` is unknown.

    Source: L_FD of CLIP-KD, arXiv 2307.12732: mse of images + mse of texts, with weight 2000.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student embeddings {student.shape} must be projected to the teacher's shape {teacher.shape}")
    student, teacher = masked_rows(student, weight), jax.lax.stop_gradient(masked_rows(teacher, weight))
    if kind == "mse":
        return weighted_mean(jnp.mean((student - teacher) ** 2, axis=-1), weight)
    if kind == "cosine":
        return weighted_mean(1 - jnp.sum(student * teacher, axis=-1), weight)
    raise ValueError(f"feature distillation {kind!r} is unknown: use 'mse' or 'cosine'")
