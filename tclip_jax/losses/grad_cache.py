"""Gradients of a loss over the whole batch when the activations of only a part fit in memory.

The contrastive loss of a batch is not the mean of the losses of its parts, because its negatives are the whole batch.
Accumulated gradients of the parts would therefore optimize another loss.

Source: GradCache, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Batch = dict[str, jax.Array]


def gradient_in_parts(
    embed: Callable[[Any, Batch], tuple[Any, Any]],
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    params: Any,
    batch: Batch,
    parts: int,
    axes: tuple[str, ...],
) -> tuple[Any, Any]:
    """Compute the gradient of `loss(params, *embed(params, batch))` with the activations of one part at a time.

    The result does not depend on `parts`. With several parts, `embed` runs twice on each of them: first for the
    embeddings, from which the gradient with respect to the embeddings follows, then to propagate that gradient to the
    parameters.

    Args:
      embed: (params, rows of the batch) -> (a pytree of arrays with the same rows, a pytree of sums over rows).
      loss: (params, all rows, all sums) -> (scalar, auxiliary values).
      params: a pytree of floats.
      batch: arrays (B, ...).
      parts: number of equal parts. Each part has rows of every device, so no data moves between devices.
      axes: mesh axes that shard the rows over the mesh in force; without a mesh there is one device.

    Returns:
      The gradient with respect to `params`, and the auxiliary values of `loss`.

    Raises:
      ValueError: `parts` does not divide the rows of a device.
    """
    if parts == 1:
        return jax.grad(lambda params: loss(params, *embed(params, batch)), has_aux=True)(params)
    pieces = _split(batch, parts, axes)
    rows, sums = jax.lax.map(lambda piece: embed(params, piece), pieces)
    rows, sums = _join(rows, axes), jax.tree.map(lambda x: jnp.sum(x, 0), sums)
    (gradients, to_rows, to_sums), others = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, rows, sums)

    def add(gradients: Any, piece: tuple[Batch, Any]) -> tuple[Any, None]:
        batch, to_rows = piece
        pull = jax.vjp(lambda params: embed(params, batch), params)[1]
        return jax.tree.map(jnp.add, gradients, *pull((to_rows, to_sums))), None

    return jax.lax.scan(add, gradients, (pieces, _split(to_rows, parts, axes)))[0], others


def _split(tree: Any, parts: int, axes: tuple[str, ...]) -> Any:
    """Reshape arrays (B, …) to (parts, B / parts, …) on every device."""

    def split(x: jax.Array) -> jax.Array:
        if len(x) % parts:
            raise ValueError(f"the {len(x)} rows of a device are not divisible by {parts} microbatches")
        return x.reshape(parts, -1, *x.shape[1:])

    return _on_every_device(split, tree, PartitionSpec(axes), PartitionSpec(None, axes))


def _join(tree: Any, axes: tuple[str, ...]) -> Any:
    """Undo `_split`."""

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    return _on_every_device(join, tree, PartitionSpec(None, axes), PartitionSpec(axes))


def _on_every_device(f: Callable[[jax.Array], jax.Array], tree: Any, was: PartitionSpec, becomes: PartitionSpec) -> Any:
    def local(tree: Any) -> Any:
        return jax.tree.map(f, tree)

    if jax.sharding.get_abstract_mesh().empty:
        return local(tree)
    return jax.shard_map(local, in_specs=was, out_specs=becomes)(tree)
