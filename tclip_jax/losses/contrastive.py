"""Contrastive losses between images and texts, and the masked similarities that all losses are built from.

Throughout, embeddings are (B, D) floats of any dtype, L2-normalised by the caller; `scale` is exp(logit_scale), a
scalar; `positives` is a bool (B, B) mask of matching (image, text) pairs, None for the diagonal; `weight` is (B,), 1
for a sample that exists, 0 for one that does not: it is no row, no column and no part of a mean; None is all 1.
All math is float32 and a loss is a float32 scalar, 0 when no sample exists. Under `jit` the embeddings may be sharded
over the batch: the loss is that of the global batch.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def positive_pairs(tokens: jax.Array, kind: str) -> jax.Array:
    """Which pairs of a batch match: bool (B, B), from tokens (B, T) int.

    `diagonal`: an image matches its own text only. `equal_text`: also every text with the same tokens, so that repeated
    captions are not each other's negatives. Raises ValueError for another kind.
    """
    if kind == "diagonal":
        return jnp.eye(len(tokens), dtype=bool)
    if kind == "equal_text":
        # Not jnp.all over T: XLA for CPU would hold (B, B, T) bytes, and for TPU move the mask to transpose it.
        return functools.reduce(operator.and_, (token[:, None] == token[None, :] for token in tokens.T))
    raise ValueError(f"positives {kind!r} is unknown: use 'diagonal' or 'equal_text'")


def existing(weight: jax.Array | None, batch: int) -> jax.Array:
    """Which samples exist: bool (B,)."""
    return jnp.ones(batch, bool) if weight is None else weight > 0


def existing_rows(embeddings: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Embeddings (B, D) in float32, zero where the sample does not exist (its NaN would reach gradients)."""
    return jnp.where(existing(weight, len(embeddings))[:, None], embeddings.astype(jnp.float32), 0)


def similarity(rows: jax.Array, columns: jax.Array, scale: ArrayLike, weight: jax.Array | None = None) -> jax.Array:
    """Logits scale · rows · columnsᵀ, float32 (B, B), the lowest float in the columns that do not exist."""
    # The default precision of an accelerator multiplies in bf16 or TF32: at scale 100 that moves logits by up to 0.05.
    cosines = jnp.matmul(
        existing_rows(rows, weight), existing_rows(columns, weight).T, precision=jax.lax.Precision.HIGHEST
    )
    # Not -inf: its product with a target of 0 would be NaN.
    return jnp.where(existing(weight, len(rows))[None, :], scale * cosines, jnp.finfo(jnp.float32).min)


def existing_positives(positives: jax.Array | None, weight: jax.Array | None, batch: int) -> jax.Array:
    """The mask of matching pairs, bool (B, B), without the samples that do not exist."""
    pairs = jnp.eye(batch, dtype=bool) if positives is None else positives
    real = existing(weight, batch)
    return pairs & real[:, None] & real[None, :]


def weighted_mean(values: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The mean of values (B,) over the samples that exist, 0 if there are none."""
    real = existing(weight, len(values))
    return jnp.sum(jnp.where(real, values, 0)) / jnp.maximum(jnp.sum(real), 1)


def cross_entropy(
    rows: jax.Array,
    columns: jax.Array,
    scale: ArrayLike,
    positives: jax.Array,
    weight: jax.Array | None = None,
) -> jax.Array:
    """The mean over rows of the cross entropy of softmax(scale · rows · columnsᵀ) with a uniform choice of positives.

    `positives` (B, B) is indexed [row, column] and comes from `existing_positives`; a row without a positive adds 0.
    """
    targets = positives / jnp.maximum(jnp.sum(positives, axis=-1, keepdims=True), 1)
    log_probabilities = jax.nn.log_softmax(similarity(rows, columns, scale, weight), axis=-1)
    return weighted_mean(-jnp.sum(targets * log_probabilities, axis=-1), weight)


def info_nce(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    positives: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> jax.Array:
    """CLIP's loss: the mean of the image → text and the text → image cross entropy.

    With several positives the target is uniform over them. With the diagonal it is open_clip's ClipLoss.
    Source: CLIP, arXiv 2103.00020, figure 3; several positives as in supervised contrastive learning, arXiv 2004.11362.
    """
    positives = existing_positives(positives, weight, len(image))
    image_to_text = cross_entropy(image, text, scale, positives, weight)
    text_to_image = cross_entropy(text, image, scale, positives.T, weight)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    bias: ArrayLike,
    positives: jax.Array | None = None,
    weight: jax.Array | None = None,
) -> jax.Array:
    """SigLIP's loss: every pair is a binary choice of logit scale · cosine + bias; sum over texts, mean over images.

    With the diagonal it is open_clip's SigLipLoss. Source: arXiv 2303.15343, section 3.2 and algorithm 1.
    """
    signs = jnp.where(existing_positives(positives, weight, len(image)), 1, -1)
    logits = similarity(image, text, scale, weight) + bias
    return weighted_mean(-jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1), weight)


def retrieval_accuracy(
    image: jax.Array, text: jax.Array, positives: jax.Array | None = None, weight: jax.Array | None = None
) -> jax.Array:
    """The share of images, 0 to 1, whose most similar text of the batch is a positive (ties: the first).

    Swap the arguments and transpose `positives` for text → image.
    """
    positives = existing_positives(positives, weight, len(image))
    top_1 = jnp.argmax(similarity(image, text, 1.0, weight), axis=-1)
    return weighted_mean(jnp.take_along_axis(positives, top_1[:, None], axis=-1)[:, 0], weight)
