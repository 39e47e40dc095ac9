"""Distillation losses between the embeddings of a student and of a frozen teacher.

The losses of affinities compare each model's images with its own texts, so the widths of both models may differ.
`feature_distillation`, and ICL in contrastive.py, need student embeddings that are projected to the teacher's width and
then normalised.

Notation: p^S_i and p^T_i are the softmax over all texts of the student's and of the teacher's logits of image i; for
text → image, images and texts are exchanged. Each model has its own logit scale. Means run over the samples that are
not masked. `…_of_rows` are the same losses from statistics of a batch that were computed before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tclip_jax.losses.exchange import Exchange
from tclip_jax.losses.statistics import Pair, RowStats, compare, compare_rows, masked_rows, weighted_mean


def crd(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    teacher: Pair,
    *,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute CLIP-KD's contrastive relational distillation: KL(teacher ‖ student) of the affinities.

        L = ½ [mean_i KL(p^T_i ‖ p^S_i) + the same for text → image]

    Args:
      image: the student's L2-normalised embeddings (B, D).
      text: the student's L2-normalised embeddings (B, D).
      scale: the student's exp(logit_scale), a scalar.
      teacher: the teacher's image embeddings (B, D'), text embeddings (B, D') and scale; no gradient reaches them.
      weight: (B,), 0 for a masked sample; None if no sample is masked.
      exchange: how devices get the embeddings of others: `Ring`, `Gather`, or None, which leaves it to XLA.

    Returns:
      The loss, a float32 scalar.

    Source: L_CRD of CLIP-KD, arXiv 2307.12732.
    """
    return crd_of_rows(*compare(image, text, scale, teacher=teacher, weight=weight, exchange=exchange))


def kl_mix(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    teacher: Pair,
    reverse: float = 0.5,
    *,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute a mix of the forward and the reverse KL divergence between the affinities of student and teacher.

        L = ½ [mean_i ((1 − r) · KL(p^T_i ‖ p^S_i) + r · KL(p^S_i ‖ p^T_i)) + the same for text → image]

    The forward divergence makes the student cover everything that is likely for the teacher. The reverse divergence
    keeps it from what is unlikely for the teacher.

    Args:
      image, text, scale, teacher, weight, exchange: as in `crd`.
      reverse: r, the fraction of the reverse divergence, from 0 (`crd`) to 1.

    Returns:
      The loss, a float32 scalar.

    Source: MiniLLM, arXiv 2306.08543, for the reverse divergence. arXiv 2404.02657 adapts the weights of both at every
    token; here they are fixed.
    """
    return kl_mix_of_rows(*compare(image, text, scale, teacher=teacher, weight=weight, exchange=exchange), reverse)


def open_clip_distillation(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    teacher: Pair,
    *,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute the cross entropy between the affinities of teacher and student, the mean of both directions.

        L = ½ [mean_i −Σ_j p^T_ij · log p^S_ij + the same for text → image]

    The gradient is that of `crd`. The value is larger by the entropy of the teacher's affinities.

    Args:
      image, text, scale, teacher, weight, exchange: as in `crd`.

    Returns:
      The loss, a float32 scalar.

    Source: `distill_loss` of open_clip's DistillClipLoss.
    """
    return open_clip_of_rows(*compare(image, text, scale, teacher=teacher, weight=weight, exchange=exchange))


def affinity_mimicking(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    teacher: Pair,
    *,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute TinyCLIP's affinity mimicking: `open_clip_distillation` with the sum of both directions, not the mean.

        L = L_I2T + L_T2I = mean_i −Σ_j p^T_ij · log p^S_ij + the same for text → image

    Args:
      image, text, scale, teacher, weight, exchange: as in `crd`.

    Returns:
      The loss, a float32 scalar.

    Source: L_distill of TinyCLIP, arXiv 2309.12314. The authors' training code then halves it.
    """
    return affinity_of_rows(*compare(image, text, scale, teacher=teacher, weight=weight, exchange=exchange))


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


def relational_agreement(
    image: tuple[jax.Array, jax.Array],
    text: tuple[jax.Array, jax.Array],
    scale: ArrayLike,
    *,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute how far student-teacher similarities of images differ from those of texts, in both directions.

        L = ½ mean_i [KL(p^T_i ‖ p^I_i) + KL(p^I_i ‖ p^T_i)],    p^I_i = softmax_j(s · ⟨x_i, X_j⟩)

    x are the student's embeddings of images and X embeddings of the teacher; p^T is the same of texts. X of the same
    modality gives vertical, X of the other modality cross relational distillation. In each term the first distribution
    is a target without a gradient. A learned scale could make all distributions uniform, so the scale is the teacher's.

    Args:
      image: x, the student's L2-normalised embeddings of images, projected to the teacher's width, and X; (B, D') each.
      text: the same of texts.
      scale: s, the teacher's exp(logit_scale).
      weight: (B,), 0 for a masked sample; None if no sample is masked.
      exchange: how devices get the embeddings of others: `Ring`, `Gather`, or None, which leaves it to XLA.

    Returns:
      The loss, a float32 scalar.

    Source: VRD and XRD of CLIP-RD, arXiv 2603.25383, after its abstract; the equations could not be read.
    """
    compared = functools.partial(compare_rows, weight=weight, exchange=exchange)
    return crd_of_rows(*agreement_rows(image, text, scale, compared))


def agreement_rows(
    image: tuple[jax.Array, jax.Array],
    text: tuple[jax.Array, jax.Array],
    scale: ArrayLike | None,
    compared: Callable[..., RowStats],
) -> tuple[RowStats, RowStats]:
    """Compare each modality by `compared`, which is `compare_rows` with the masks of a batch, for `crd_of_rows`.

    The other modality is its teacher. No gradient reaches the teacher's embeddings, the second of each pair.
    """
    images, texts = ((student, jax.lax.stop_gradient(teacher)) for student, teacher in (image, text))
    return compared(*images, scale, teacher=(*texts, scale)), compared(*texts, scale, teacher=(*images, scale))


def crd_of_rows(image: RowStats, text: RowStats) -> jax.Array:
    """`crd` from the statistics of each image and of each text, (B,), of student and teacher."""
    return kl_mix_of_rows(image, text, reverse=0)


def kl_mix_of_rows(image: RowStats, text: RowStats, reverse: float = 0.5) -> jax.Array:
    """`kl_mix` from the statistics of each image and of each text, (B,), of student and teacher."""

    def divergence(rows: RowStats) -> jax.Array:
        student, teacher = rows.soft["student"], rows.soft["teacher"]
        forward, backward = teacher["student"] - teacher["teacher"], student["teacher"] - student["student"]
        return weighted_mean((1 - reverse) * forward + reverse * backward, rows.mask)

    return (divergence(image) + divergence(text)) / 2


def open_clip_of_rows(image: RowStats, text: RowStats) -> jax.Array:
    """`open_clip_distillation` from the statistics of each image and of each text, (B,), of student and teacher."""
    image_to_text, text_to_image = (weighted_mean(rows.soft["teacher"]["student"], rows.mask) for rows in (image, text))
    return (image_to_text + text_to_image) / 2


def affinity_of_rows(image: RowStats, text: RowStats) -> jax.Array:
    """`affinity_mimicking` from the statistics of each image and of each text, (B,), of student and teacher."""
    return 2 * open_clip_of_rows(image, text)
