"""Contrastive losses between images and texts, made of what `rows.compare` says of each of them."""

from __future__ import annotations

import jax

from tclip_jax.losses.statistics import RowStats, weighted_mean


def info_nce(image: RowStats, text: RowStats) -> jax.Array:
    """CLIP's loss: the mean of the image → text and the text → image cross entropy.

    With several positives the target is uniform over them. With one each it is open_clip's ClipLoss; between a
    student's and a teacher's embeddings it is CLIP-KD's ICL.
    Source: CLIP, arXiv 2103.00020, figure 3; several positives as in supervised contrastive learning, arXiv 2004.11362;
    L_ICL of arXiv 2307.12732.
    """
    return (weighted_mean(image.hard, image.mask) + weighted_mean(text.hard, text.mask)) / 2


def sigmoid_loss(image: RowStats) -> jax.Array:
    """SigLIP's loss: every pair is a binary choice of logit scale · cosine + bias; sum over texts, mean over images.

    With one positive each it is open_clip's SigLipLoss. Source: arXiv 2303.15343, section 3.2 and algorithm 1.

    Raises:
      ValueError: the images were compared without a bias.
    """
    if image.sigmoid is None:
        raise ValueError("the sigmoid loss needs rows that were compared with a bias")
    return weighted_mean(image.sigmoid, image.mask)


def retrieval_accuracy(rows: RowStats) -> jax.Array:
    """The share of rows, 0 to 1, whose most similar column of the batch is a positive (ties: the first)."""
    return weighted_mean(rows.hit, rows.mask)
