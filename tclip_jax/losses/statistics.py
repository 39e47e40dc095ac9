"""Statistics of image-text similarities per sample, from which the contrastive losses are computed.

Embeddings are floats (B, D), L2-normalised by the caller, and `scale` is exp(logit_scale), a scalar. Samples with equal
`tokens` (B, T) are positives of each other; without tokens each sample is its own positive. `weight` (B,) 0 masks a
sample everywhere; without weights no sample is masked. All arithmetic is float32. A loss is a float32 scalar, 0 if
every sample is masked. Under `jit` the embeddings may be sharded over the batch: the loss is that of the global batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tclip_jax.losses.exchange import PAIRS, Exchange, Operand, PartialStats, exchange_stats

Pair = tuple[jax.Array, jax.Array, ArrayLike]


class RowStats(NamedTuple):
    """Statistics of each sample against all samples of the other modality; float32 (B,) unless stated otherwise.

    p is the softmax of a sample's logits z, and P is the set of its positives.

    Attributes:
      hard: −1/|P| Σ_{j ∈ P} log p_j of the student, the cross entropy of a uniform target over the positives.
      soft: soft[a][b] = −Σ_j p^a_j · log p^b_j, a cross entropy; a and b are "student" or "teacher". soft[a][a] is the
        entropy of a.
      sigmoid: Σ_j −log σ(± z_j) of the student, + for positives; None without a bias.
      hit: bool, whether the most similar sample (the first of equal maxima) is a positive.
      mask: bool, False for a masked sample.
    """

    hard: jax.Array
    soft: dict[str, dict[str, jax.Array]]
    sigmoid: jax.Array | None
    hit: jax.Array
    mask: jax.Array


def compare_rows(
    rows: jax.Array,
    columns: jax.Array,
    scale: ArrayLike,
    *,
    teacher: Pair | None = None,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    bias: ArrayLike | None = None,
    exchange: Exchange = None,
) -> RowStats:
    """Compare every row with all columns by the logits scale · rows · columnsᵀ + bias.

    Args:
      rows: L2-normalised embeddings (B, D).
      columns: L2-normalised embeddings (B, D) of the other modality.
      scale: exp(logit_scale), a scalar.
      teacher: the teacher's rows (B, D'), columns (B, D') and scale; no gradient reaches them. None without a teacher.
      tokens: int (B, T); samples with equal tokens are positives. None: each sample is its own positive.
      weight: (B,), 0 for a masked sample; None if no sample is masked.
      bias: scalar added to the student's logits, for `sigmoid_loss`; None for no bias.
      exchange: how devices get the columns of others: `Ring`, `Gather`, or None, which leaves it to XLA.

    Returns:
      Statistics of each row, (B,).

    Raises:
      ValueError: the embeddings of the two modalities have different shapes.
    """
    for x, y in ((rows, columns), *([teacher[:2]] if teacher else [])):
        if x.ndim != 2 or x.shape != y.shape or len(x) != len(rows):
            raise ValueError(f"embeddings of images and texts are {x.shape} and {y.shape}: both must be (B, D)")
    mask = sample_mask(weight, len(rows))
    shared = {"tokens": tokens, "index": jnp.arange(len(rows), dtype=jnp.int32), "mask": mask}
    theirs_rows = theirs_columns = None
    if teacher is not None:
        their_scale = jax.lax.stop_gradient(jnp.asarray(teacher[2], jnp.float32))
        theirs_rows, theirs_columns = (jax.lax.stop_gradient(masked_rows(x, weight)) for x in teacher[:2])
        theirs_rows = their_scale * theirs_rows
    biases = None if bias is None else jnp.broadcast_to(jnp.asarray(bias, jnp.float32), mask.shape)
    row_side = Operand(jnp.float32(scale) * masked_rows(rows, weight), biases, theirs_rows, **shared)
    column_side = Operand(masked_rows(columns, weight), None, theirs_columns, **shared)
    return _rows_of(exchange_stats(row_side, column_side, exchange), mask)


def compare(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    *,
    teacher: Pair | None = None,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    bias: ArrayLike | None = None,
    exchange: Exchange = None,
) -> tuple[RowStats, RowStats]:
    """Compare images with texts and texts with images, both by `compare_rows`.

    Args:
      image: L2-normalised embeddings (B, D).
      text: L2-normalised embeddings (B, D).
      scale: exp(logit_scale), a scalar.
      teacher: the teacher's image and text embeddings (B, D') and scale, or None.
      tokens: as in `compare_rows`.
      weight: as in `compare_rows`.
      bias: as in `compare_rows`.
      exchange: as in `compare_rows`.

    Returns:
      Statistics of each image against all texts, and of each text against all images, (B,).
    """
    swapped = None if teacher is None else (teacher[1], teacher[0], teacher[2])
    shared: Any = {"tokens": tokens, "weight": weight, "bias": bias, "exchange": exchange}
    image_rows = compare_rows(image, text, scale, teacher=teacher, **shared)
    return image_rows, compare_rows(text, image, scale, teacher=swapped, **shared)


def sample_mask(weight: jax.Array | None, batch: int) -> jax.Array:
    """Mask of the samples with a weight above 0: bool (B,)."""
    return jnp.ones(batch, bool) if weight is None else weight > 0


def masked_rows(embeddings: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Embeddings (B, D) in float32, zero for masked samples, whose NaN would otherwise reach gradients."""
    return jnp.where(sample_mask(weight, len(embeddings))[:, None], embeddings.astype(jnp.float32), 0)


def weighted_mean(values: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Mean of values (B,) over the samples that are not masked, 0 if all are masked."""
    mask = sample_mask(weight, len(values))
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def _rows_of(sums: PartialStats, mask: jax.Array) -> RowStats:
    log_total = {name: jnp.log(sums.sums[name][0]) for name in sums.top}
    soft = {}
    for by in log_total:
        total, *below = sums.sums[by]
        soft[by] = {of: log_total[of] - x / total for of, x in zip(log_total, below, strict=True)}
    count, below_top, *choices = sums.sums[PAIRS]
    hard = jnp.where(count > 0, log_total["student"] - below_top / jnp.maximum(count, 1), 0)
    return RowStats(hard, soft, -choices[0] if choices else None, sums.hit, mask)
