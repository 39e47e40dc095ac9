"""Contrastive losses between images and texts, computed from the statistics of `statistics.compare`.

Notation: x_i and y_j are the L2-normalised embeddings of image i and text j, s is exp(logit_scale), and the logits are
z_ij = s · ⟨x_i, y_j⟩, plus the bias b if there is one. P_i is the set of positives of sample i. Means and sums run over
the samples that are not masked.
"""

from __future__ import annotations

import jax

from tclip_jax.losses.statistics import RowStats, weighted_mean


def info_nce(image: RowStats, text: RowStats) -> jax.Array:
    """Compute CLIP's contrastive loss (InfoNCE), the mean of the image → text and the text → image cross entropy.

        L = ½ [mean_i H_i + mean_j H_j],    H_i = −1/|P_i| Σ_{j ∈ P_i} log softmax_j(z_i)

    H_j is the same with images and texts exchanged. With several positives the target is uniform over them. With one
    positive per sample the loss equals open_clip's ClipLoss. Between the embeddings of a student and of a teacher it is
    CLIP-KD's ICL.

    Args:
      image: statistics of each image against all texts, (B,).
      text: statistics of each text against all images, (B,).

    Returns:
      The loss, a float32 scalar.

    Source: CLIP, arXiv 2103.00020, figure 3; several positives as in supervised contrastive learning, arXiv 2004.11362;
    L_ICL of CLIP-KD, arXiv 2307.12732.
    """
    return (weighted_mean(image.hard, image.mask) + weighted_mean(text.hard, text.mask)) / 2


def sigmoid_loss(image: RowStats) -> jax.Array:
    """Compute SigLIP's loss: each image-text pair is a binary classification.

        L = mean_i Σ_j −log σ(±z_ij),    z_ij = s · ⟨x_i, y_j⟩ + b

    The sign is + for positives and − for all other pairs. With one positive per sample the loss equals open_clip's
    SigLipLoss.

    Args:
      image: statistics of each image against all texts, (B,), computed with a bias.

    Returns:
      The loss, a float32 scalar.

    Raises:
      ValueError: the statistics have no bias.

    Source: SigLIP, arXiv 2303.15343, section 3.2 and algorithm 1.
    """
    if image.sigmoid is None:
        raise ValueError("the sigmoid loss needs statistics with a bias: pass bias to compare")
    return weighted_mean(image.sigmoid, image.mask)


def retrieval_accuracy(rows: RowStats) -> jax.Array:
    """Compute the fraction of samples whose most similar sample in the batch is a positive.

    Args:
      rows: statistics of each sample against all samples of the other modality, (B,). The first of equal maxima counts.

    Returns:
      A float32 scalar from 0 to 1.
    """
    return weighted_mean(rows.hit, rows.mask)
