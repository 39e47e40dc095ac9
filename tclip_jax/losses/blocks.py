"""Blocks of a matrix of similarities, and what losses need of them: for each row a few sums over its columns.

A row's sums over some columns and over the others `merge` into those over all, as in online softmax (arXiv 1805.02867),
so that nobody needs to hold a whole matrix, nor any device all columns.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PAIRS = "pairs"
_LOWEST = jnp.finfo(jnp.float32).min  # not -inf: its product with a weight of 0 would be NaN
_FAR = -1e30  # as good as -inf below the top, and finite when many are added


class Side(NamedTuple):
    """Samples as the rows, or as the columns, of a matrix of logits rows · columnsᵀ.

    Attributes:
      student: float32 (B, D), zero for a sample that does not exist; of rows, times the scale of the logits.
      bias: of rows, float32 (B,), is added to the student's logits; None for none, and of columns.
      teacher: as `student`, (B, D') of a teacher, or None.
      tokens: int (B, T), equal ones belong together; None: a row belongs to the column of its own index.
      index: int32 (B,), which sample of the batch.
      real: bool (B,), whether it exists.
    """

    student: jax.Array
    bias: jax.Array | None = None
    teacher: jax.Array | None = None
    tokens: jax.Array | None = None
    index: Any = None
    real: Any = None


class Sums(NamedTuple):
    """Of each row, sums over columns.

    Attributes:
      top: for each model the largest logit, (B,).
      sums: for each model Σ exp(logit − top), and the sums of these weights times (logit − top) of each model, each
        (B,); for `PAIRS` the number of positives, the sum of the student's (logit − top) of them and, with a bias, that
        of log σ(± logit) of all pairs.
      best: int32 (B,), the index of the first column with the student's largest logit.
      hit: bool (B,), whether that is a positive.
    """

    top: dict[str, jax.Array]
    sums: dict[str, tuple[jax.Array, ...]]
    best: jax.Array
    hit: jax.Array


def logits_of(rows: Side, columns: Side) -> dict[str, jax.Array]:
    """The logits (B, C) of each model, 0 where the row or the column does not exist."""
    # The default precision of an accelerator multiplies in bf16 or TF32: at scale 100 that moves logits by up to 0.05.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    logits = {"student": product(rows.student, columns.student.T)}
    if rows.bias is not None:
        logits["student"] += rows.bias[:, None]
    if rows.teacher is not None and columns.teacher is not None:
        logits["teacher"] = product(rows.teacher, columns.teacher.T)
    return logits


def positives_of(rows: Side, columns: Side) -> jax.Array:
    """Which pairs belong together: bool (B, C)."""
    if rows.tokens is None or columns.tokens is None:
        equal = rows.index[:, None] == columns.index[None, :]
    else:
        # Not jnp.all over T: XLA for CPU would hold (B, C, T) bytes, and for TPU move the mask to transpose it.
        each = zip(rows.tokens.T, columns.tokens.T, strict=True)
        equal = functools.reduce(operator.and_, (row[:, None] == column[None, :] for row, column in each))
    return equal & rows.real[:, None] & columns.real[None, :]


def sums_under(rows: Side, columns: Side, top: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
    """`Sums.sums` with the given `top`, which has no gradient: what is made of them does not depend on it."""
    logits, positives = logits_of(rows, columns), positives_of(rows, columns)
    # Losses are small differences of large logits: what is summed is how far they lie below the top.
    below = {name: jnp.where(columns.real[None, :], x - top[name][:, None], 0) for name, x in logits.items()}
    sums = {}
    for name, x in logits.items():
        weights = jnp.exp(jnp.where(columns.real[None, :], x, _LOWEST) - top[name][:, None])
        sums[name] = jnp.sum(weights, 1), *(jnp.sum(weights * y, 1) for y in below.values())
    x = logits["student"]
    pairs = [jnp.sum(positives.astype(jnp.float32), 1), jnp.sum(jnp.where(positives, below["student"], 0), 1)]
    if rows.bias is not None:
        choices = jax.nn.log_sigmoid(jnp.where(positives, x, -x))
        pairs.append(jnp.sum(jnp.where(columns.real[None, :], choices, 0), 1))
    return sums | {PAIRS: tuple(pairs)}


def sums_of(rows: Side, columns: Side) -> Sums:
    """Of these columns alone."""
    masked = {name: jnp.where(columns.real[None, :], x, _LOWEST) for name, x in logits_of(rows, columns).items()}
    top = {name: jax.lax.stop_gradient(jnp.max(x, 1)) for name, x in masked.items()}
    best = jnp.argmax(masked["student"], 1)
    hit = jnp.take_along_axis(positives_of(rows, columns), best[:, None], 1)[:, 0]
    return Sums(top, sums_under(rows, columns, top), columns.index[best], hit)


def nothing(rows: Side, columns: Side) -> Sums:
    """The sums over no columns."""
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sums_of, rows, columns))
    return empty._replace(top={name: jnp.full_like(x, _LOWEST) for name, x in empty.top.items()})


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over the columns of both."""
    top = {name: jnp.maximum(a.top[name], b.top[name]) for name in a.top}

    def under(part: Sums) -> dict[str, tuple[jax.Array, ...]]:
        moved = {of: jnp.maximum(part.top[of] - top[of], _FAR) for of in top}
        scaled = {}
        for name in top:
            total, *below = part.sums[name]
            lowered = [x + total * by for x, by in zip(below, moved.values(), strict=True)]
            scaled[name] = tuple(x * jnp.exp(part.top[name] - top[name]) for x in (total, *lowered))
        count, pairs, *choices = part.sums[PAIRS]
        return scaled | {PAIRS: (count, pairs + count * moved["student"], *choices)}

    old, new = a.top["student"], b.top["student"]
    better = (new > old) | ((new == old) & (b.best < a.best))
    sums = jax.tree.map(jnp.add, under(a), under(b))
    return Sums(top, sums, jnp.where(better, b.best, a.best), jnp.where(better, b.hit, a.hit))
