"""Partial statistics of a similarity matrix, and how devices exchange embeddings to compute them.

`merge` combines the statistics of a row over two sets of columns into those over both, as online softmax does (arXiv
1805.02867). No device therefore needs the whole matrix, or all columns.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

PAIRS = "pairs"
_LOWEST = jnp.finfo(jnp.float32).min  # -inf times a weight of 0 would be NaN
_FAR = -1e30  # as good as -inf below the top, and finite when many are added


class Operand(NamedTuple):
    """Samples as the rows or the columns of a matrix of logits, rows · columnsᵀ.

    Attributes:
      student: float32 (B, D), zero for a masked sample; rows are multiplied by the logit scale.
      bias: float32 (B,), added to the student's logits of each row; None for no bias, and for columns.
      teacher: as `student`, (B, D') of a teacher, or None.
      tokens: int (B, T); samples with equal tokens are positives. None: the positive of a row is the column of its
        index.
      index: int32 (B,), position of the sample in the batch.
      mask: bool (B,), False for a masked sample.
    """

    student: jax.Array
    bias: jax.Array | None = None
    teacher: jax.Array | None = None
    tokens: jax.Array | None = None
    index: Any = None
    mask: Any = None


class PartialStats(NamedTuple):
    """Statistics of each row over some columns.

    Attributes:
      top: for each model, the largest logit, (B,).
      sums: for each model, Σ exp(logit − top) and, for every model, the sum of these weights times that model's
        (logit − top), each (B,). For `PAIRS`, the number of positives, the sum of the student's (logit − top) over
        positives and, with a bias, the sum of log σ(± logit) over all pairs.
      best: int32 (B,), the index of the first column with the student's largest logit.
      hit: bool (B,), whether that column is a positive.
    """

    top: dict[str, jax.Array]
    sums: dict[str, tuple[jax.Array, ...]]
    best: jax.Array
    hit: jax.Array


def logits_of(rows: Operand, columns: Operand) -> dict[str, jax.Array]:
    """Compute the logits (B, C) of each model, 0 if the row or the column is masked."""
    # Accelerators multiply in bf16 or TF32 by default, which changes logits by up to 0.05 at scale 100.
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    logits = {"student": product(rows.student, columns.student.T)}
    if rows.bias is not None:
        logits["student"] += rows.bias[:, None]
    if rows.teacher is not None and columns.teacher is not None:
        logits["teacher"] = product(rows.teacher, columns.teacher.T)
    return logits


def positives_of(rows: Operand, columns: Operand) -> jax.Array:
    """Compute which pairs are positives: bool (B, C)."""
    if rows.tokens is None or columns.tokens is None:
        equal = rows.index[:, None] == columns.index[None, :]
    else:
        # jnp.all over T would allocate (B, C, T) bytes on CPUs, and move the mask to transpose it on TPUs.
        each = zip(rows.tokens.T, columns.tokens.T, strict=True)
        equal = functools.reduce(operator.and_, (row[:, None] == column[None, :] for row, column in each))
    return equal & rows.mask[:, None] & columns.mask[None, :]


def sums_under(rows: Operand, columns: Operand, top: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
    """Compute `PartialStats.sums` relative to the given `top`.

    `top` has no gradient, because the losses do not depend on it.
    """
    logits, positives = logits_of(rows, columns), positives_of(rows, columns)
    # Losses are small differences of large logits, so the sums are of distances below the top.
    below = {name: jnp.where(columns.mask[None, :], x - top[name][:, None], 0) for name, x in logits.items()}
    sums = {}
    for name, x in logits.items():
        weights = jnp.exp(jnp.where(columns.mask[None, :], x, _LOWEST) - top[name][:, None])
        sums[name] = jnp.sum(weights, 1), *(jnp.sum(weights * y, 1) for y in below.values())
    x = logits["student"]
    pairs = [jnp.sum(positives.astype(jnp.float32), 1), jnp.sum(jnp.where(positives, below["student"], 0), 1)]
    if rows.bias is not None:
        choices = jax.nn.log_sigmoid(jnp.where(positives, x, -x))
        pairs.append(jnp.sum(jnp.where(columns.mask[None, :], choices, 0), 1))
    return sums | {PAIRS: tuple(pairs)}


def partial_stats(rows: Operand, columns: Operand) -> PartialStats:
    """Compute the statistics of the rows over these columns."""
    masked = {name: jnp.where(columns.mask[None, :], x, _LOWEST) for name, x in logits_of(rows, columns).items()}
    top = {name: jax.lax.stop_gradient(jnp.max(x, 1)) for name, x in masked.items()}
    best = jnp.argmax(masked["student"], 1)
    hit = jnp.take_along_axis(positives_of(rows, columns), best[:, None], 1)[:, 0]
    return PartialStats(top, sums_under(rows, columns, top), columns.index[best], hit)


def nothing(rows: Operand, columns: Operand) -> PartialStats:
    """The statistics over no columns."""
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(partial_stats, rows, columns))
    return empty._replace(top={name: jnp.full_like(x, _LOWEST) for name, x in empty.top.items()})


def merge(a: PartialStats, b: PartialStats) -> PartialStats:
    """Combine the statistics over two sets of columns into those over both."""
    top = {name: jnp.maximum(a.top[name], b.top[name]) for name in a.top}

    def under(part: PartialStats) -> dict[str, tuple[jax.Array, ...]]:
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
    return PartialStats(top, sums, jnp.where(better, b.best, a.best), jnp.where(better, b.hit, a.hit))


class Ring(NamedTuple):
    """Options of the ring of devices.

    Attributes:
      axes: axes of the mesh in force (`jax.set_mesh`) that shard the batch, which is replicated along all others.
      chunk: the most columns that a device compares with its rows at a time. Memory is O(rows per device · chunk).
    """

    axes: tuple[str, ...]
    chunk: int = 1024


class Gather(NamedTuple):
    """Each device gathers the columns of all devices; gradients of the columns are reduce-scattered.

    Attributes:
      axes: as in `Ring`.
    """

    axes: tuple[str, ...]


Exchange = Ring | Gather | None


def exchange_stats(rows: Operand, columns: Operand, exchange: Exchange) -> PartialStats:
    """Compute `partial_stats(rows, columns)` of samples that are sharded over the axes of `exchange`.

    With None, XLA chooses the collectives; it all-reduces the gradients of all columns.
    """
    if exchange is None:
        return partial_stats(rows, columns)
    if isinstance(exchange, Ring):
        return ring_stats(rows, columns, exchange)

    def on_device(rows: Operand, columns: Operand) -> PartialStats:
        # Axis by axis: XLA for TPUs all-reduces what is reduce-scattered over two axes at once.
        for name in reversed(exchange.axes):
            columns = jax.tree.map(functools.partial(jax.lax.all_gather, axis_name=name, tiled=True), columns)
        return partial_stats(rows, columns)

    return _shard_map(on_device, exchange.axes)(rows, columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def ring_stats(rows: Operand, columns: Operand, ring: Ring) -> PartialStats:
    """Compute `partial_stats(rows, columns)` for samples that are sharded over `ring.axes`.

    Each device keeps its rows, and the columns of all devices pass through it, a chunk at a time. The forward pass
    saves only the largest logit of each row. The backward pass sends the columns around the ring once more, and their
    gradients with them.

    Args:
      rows: samples (B, ...).
      columns: samples (B, ...).
      ring: mesh axes and chunk size.

    Returns:
      The statistics over all columns, sharded like the rows. They are differentiable with respect to `student` and
      `bias`.
    """

    def on_device(rows: Operand, columns: Operand) -> PartialStats:
        def visit(_: int, state: tuple[PartialStats, Operand]) -> tuple[PartialStats, Operand]:
            def add(sums: PartialStats, chunk: Operand) -> tuple[PartialStats, None]:
                return merge(sums, partial_stats(rows, chunk)), None

            sums, columns = state
            return jax.lax.scan(add, sums, _split_chunks(columns, ring))[0], _send_on(columns, ring)

        start = _varying(nothing(rows, columns), ring), columns
        return jax.lax.fori_loop(0, jax.lax.axis_size(ring.axes), visit, start)[0]

    return _shard_map(on_device, ring.axes)(rows, columns)


def _forward(rows: Operand, columns: Operand, ring: Ring) -> tuple[PartialStats, Any]:
    sums = ring_stats(rows, columns, ring)
    return sums, (rows, columns, sums.top)


def _backward(ring: Ring, kept: Any, cotangent: PartialStats) -> tuple[Operand, Operand]:
    def on_device(rows: Operand, columns: Operand, top: Any, cotangent: Any) -> tuple[Any, Any]:
        def sums(row_floats: Any, column_floats: Any, chunk: Operand) -> Any:
            return sums_under(_with_floats(rows, row_floats), _with_floats(chunk, column_floats), top)

        def visit(_: int, state: tuple[Any, Any, Operand]) -> tuple[Any, Any, Operand]:
            def add(to_rows: Any, each: tuple[Operand, Any]) -> tuple[Any, Any]:
                chunk, to_chunk = each
                pull = jax.vjp(functools.partial(sums, chunk=chunk), _floats(rows), _floats(chunk))[1]
                more_to_rows, more_to_chunk = pull(cotangent)
                return _add(to_rows, more_to_rows), _add(to_chunk, more_to_chunk)

            to_rows, to_columns, columns = state
            to_rows, to_chunks = jax.lax.scan(add, to_rows, _split_chunks((columns, to_columns), ring))
            return to_rows, *_send_on((_join_chunks(to_chunks, len(columns.student)), columns), ring)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (_floats(rows), _floats(columns)))
        start = *_varying(zeros, ring), columns
        return jax.lax.fori_loop(0, jax.lax.axis_size(ring.axes), visit, start)[:2]

    return _shard_map(on_device, ring.axes)(*kept, cotangent.sums)


ring_stats.defvjp(_forward, _backward)


def _floats(side: Operand) -> Operand:
    """The fields with a gradient."""
    return Operand(side.student, side.bias)


def _with_floats(side: Operand, floats: Operand) -> Operand:
    return side._replace(student=floats.student, bias=floats.bias)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _shard_map(f: Any, axes: tuple[str, ...]) -> Any:
    each = PartitionSpec(axes)
    return jax.shard_map(f, in_specs=each, out_specs=each)


def _varying(tree: Any, ring: Ring) -> Any:
    return jax.lax.pcast(tree, ring.axes, to="varying")


def _send_on(tree: Any, ring: Ring) -> Any:
    devices = jax.lax.axis_size(ring.axes)
    return jax.lax.ppermute(tree, ring.axes, [(i, (i + 1) % devices) for i in range(devices)])


def _split_chunks(tree: Any, ring: Ring) -> Any:
    """Reshape samples (B, …) to the fewest equal chunks (N, C, …) with C at most `ring.chunk`.

    Zeros pad the last chunk. In `Operand.mask` a zero is a masked sample, which changes no sum.
    """
    samples = len(jax.tree.leaves(tree)[0])
    chunks = -(-samples // ring.chunk)
    size = -(-samples // chunks)

    def split(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, chunks * size - samples), *[(0, 0)] * (x.ndim - 1)])
        return filled.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join_chunks(chunks: Any, samples: int) -> Any:
    """Undo `_split_chunks`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:samples], chunks)
