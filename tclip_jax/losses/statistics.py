"""Statistics of similarities per sample, image → text or text → image, from which contrastive losses are computed.

Embeddings are (B, D) floats of any dtype, L2-normalised by the caller, and `scale` is exp(logit_scale), a scalar.
Samples with equal `tokens` (B, T) are positives of each other; None: each sample is its own positive. `weight` (B,) 0
masks a sample everywhere; None masks none. All math is float32, and a loss is a float32 scalar, 0 when every sample is
masked. Under `jit` the embeddings may be sharded over the batch: the loss is that of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tclip_jax.losses.ring import PAIRS, Operand, PartialStats, Ring, partial_stats, ring_stats

Pair = tuple[jax.Array, jax.Array, ArrayLike]


class RowStats(NamedTuple):
    """Statistics of each sample against all samples of the other modality; float32 (B,) unless stated otherwise.

    Attributes:
      hard: the cross entropy of a uniform choice among its positives and the softmax of its logits.
      soft: [by][of]: the cross entropy of the softmax of one model's logits and that of another's, "student" or
        "teacher"; with [by] = [of] it is the entropy.
      sigmoid: Σ −log σ(± logit), + for positives; None without a bias.
      hit: bool, whether the most similar sample (the first of equals) is a positive.
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
    ring: Ring | None = None,
) -> RowStats:
    """Compares every row with all columns by the logits scale · rows · columnsᵀ + bias.

    Args:
      teacher: its rows, its columns and its scale; no gradient reaches it.
      bias: of the student's logits, for `sigmoid_loss`.
      ring: never hold all columns on one device. The result is the same; without it they are gathered.
    """
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
    sums = partial_stats(row_side, column_side) if ring is None else ring_stats(row_side, column_side, ring)
    return _rows_of(sums, mask)


def compare(
    image: jax.Array,
    text: jax.Array,
    scale: ArrayLike,
    *,
    teacher: Pair | None = None,
    tokens: jax.Array | None = None,
    weight: jax.Array | None = None,
    bias: ArrayLike | None = None,
    ring: Ring | None = None,
) -> tuple[RowStats, RowStats]:
    """`compare_rows` of images with texts and of texts with images; `teacher` is image, text and scale."""
    swapped = None if teacher is None else (teacher[1], teacher[0], teacher[2])
    image_rows = compare_rows(image, text, scale, teacher=teacher, tokens=tokens, weight=weight, bias=bias, ring=ring)
    return image_rows, compare_rows(
        text, image, scale, teacher=swapped, tokens=tokens, weight=weight, bias=bias, ring=ring
    )


def sample_mask(weight: jax.Array | None, batch: int) -> jax.Array:
    """The samples that are not masked: bool (B,)."""
    return jnp.ones(batch, bool) if weight is None else weight > 0


def masked_rows(embeddings: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Embeddings (B, D) in float32, zero where masked (a NaN there would reach gradients)."""
    return jnp.where(sample_mask(weight, len(embeddings))[:, None], embeddings.astype(jnp.float32), 0)


def weighted_mean(values: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The mean of values (B,) over the samples that are not masked, 0 if all are."""
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
