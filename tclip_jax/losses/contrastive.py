"""Contrastive losses between images and texts.

Notation: x_i and y_j are the L2-normalised embeddings of image i and text j, s is exp(logit_scale), and the logits are
z_ij = s · ⟨x_i, y_j⟩, plus the bias b if there is one. P_i is the set of positives of sample i. Means and sums run over
the samples that are not masked. The arguments are those of `statistics.compare`.

Each loss is a function of embeddings. A training step computes the statistics of a batch once, and calls the functions
of rows, which the losses share.
"""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from tclip_jax.losses.exchange import Exchange
from tclip_jax.losses.statistics import RowStats, compare, compare_rows, weighted_mean


def info_nce(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    *,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute CLIP's contrastive loss (InfoNCE), the mean of the image → text and the text → image cross entropy.

        L = ½ [mean_i H_i + mean_j H_j],    H_i = −1/|P_i| Σ_{j ∈ P_i} log softmax_j(z_i)

    H_j is the same with images and texts exchanged. With several positives the target is uniform over them. With one
    positive per sample the loss equals open_clip's ClipLoss.

    Args:
      image: L2-normalised embeddings (B, D).
      text: L2-normalised embeddings (B, D).
      scale: s, a scalar.
      tokens: int (B, T); samples with equal tokens are positives. None: each sample is its own positive.
      weight: (B,), 0 for a masked sample; None if no sample is masked.
      exchange: how devices get the embeddings of others: `Ring`, `Gather`, or None, which leaves it to XLA.

    Returns:
      The loss, a float32 scalar.

    Source: CLIP, arXiv 2103.00020, figure 3; several positives as in supervised contrastive learning, arXiv 2004.11362.
    """
    return info_nce_of_rows(*compare(image, text, scale, tokens=tokens, weight=weight, exchange=exchange))


def interactive_contrastive(
    image: jax.Array,
    text: jax.Array,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    scale: ArrayLike,
    *,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute CLIP-KD's interactive contrastive loss (ICL): InfoNCE between embeddings of a student and of a teacher.

        L = ½ [mean_i H_i(student's images, teacher's texts) + mean_j H_j(student's texts, teacher's images)]

    Args:
      image: the student's L2-normalised embeddings (B, D), projected to the teacher's width.
      text: the same of texts, (B, D).
      teacher_image: the teacher's L2-normalised embeddings (B, D).
      teacher_text: the same of texts, (B, D).
      scale: s, a scalar, which CLIP-KD learns for this loss alone.
      tokens: as in `info_nce`.
      weight: as in `info_nce`.
      exchange: as in `info_nce`.

    Returns:
      The loss, a float32 scalar.

    Source: L_ICL of CLIP-KD, arXiv 2307.12732.
    """
    return info_nce_of_rows(
        compare_rows(image, teacher_text, scale, tokens=tokens, weight=weight, exchange=exchange),
        compare_rows(text, teacher_image, scale, tokens=tokens, weight=weight, exchange=exchange),
    )


def sigmoid_loss(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    exchange: Exchange = None,
) -> jax.Array:
    """Compute SigLIP's loss: each image-text pair is a binary classification.

        L = mean_i Σ_j −log σ(±z_ij),    z_ij = s · ⟨x_i, y_j⟩ + b

    The sign is + for positives and − for all other pairs. With one positive per sample the loss equals open_clip's
    SigLipLoss.

    Args:
      image: L2-normalised embeddings (B, D).
      text: L2-normalised embeddings (B, D).
      scale: s, a scalar.
      bias: b, a scalar.
      tokens: as in `info_nce`.
      weight: as in `info_nce`.
      exchange: as in `info_nce`.

    Returns:
      The loss, a float32 scalar.

    Source: SigLIP, arXiv 2303.15343, section 3.2 and algorithm 1.
    """
    return sigmoid_of_rows(compare_rows(image, text, scale, tokens=tokens, weight=weight, bias=bias, exchange=exchange))


def retrieval_accuracy(
    image: jax.Array, text: jax.Array, *, tokens: jax.Array | None = None, weight: jax.Array | None = None
) -> jax.Array:
    """Compute the fraction of images whose most similar text in the batch is a positive.

    Args:
      image: L2-normalised embeddings (B, D).
      text: L2-normalised embeddings (B, D).
      tokens: as in `info_nce`.
      weight: as in `info_nce`.

    Returns:
      A float32 scalar from 0 to 1.
    """
    return accuracy_of_rows(compare_rows(image, text, 1.0, tokens=tokens, weight=weight))


def info_nce_of_rows(image: RowStats, text: RowStats) -> jax.Array:
    """`info_nce` from the statistics of each image against all texts, and of each text against all images, (B,)."""
    return (weighted_mean(image.hard, image.mask) + weighted_mean(text.hard, text.mask)) / 2


def sigmoid_of_rows(image: RowStats) -> jax.Array:
    """`sigmoid_loss` from the statistics of each image against all texts, (B,), computed with a bias.

    Raises:
      ValueError: the statistics have no bias.
    """
    if image.sigmoid is None:
        raise ValueError("the sigmoid loss needs statistics with a bias: pass bias to compare")
    return weighted_mean(image.sigmoid, image.mask)


def accuracy_of_rows(rows: RowStats) -> jax.Array:
    """`retrieval_accuracy` from the statistics of each sample, (B,); the first of equal maxima counts."""
    return weighted_mean(rows.hit, rows.mask)
