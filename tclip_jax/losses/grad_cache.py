"""Gradients of a loss that looks at a whole batch, where only a part of it fits through the model at a time.

A contrastive loss of parts is not that of the whole, so averaging the parts' gradients would train something else.
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
    """The gradient of `loss(params, *embed(params, batch))` and what else `loss` returns, whatever `parts` is.

    With several, `embed` sees them one after the other, twice: first for its values, from which follows the gradient
    with respect to them, then to carry that on to the parameters. Activations of one part exist at a time.

    Args:
      embed: from parameters and rows of the batch to (a tree of arrays with the same rows, a tree of sums over rows).
      loss: from parameters, all rows and all sums to (scalar, anything).
      params: floats.
      batch: arrays with rows first.
      parts: equal ones, of the rows of each device: nothing moves between devices.
      axes: of the mesh in force over which rows lie; without a mesh there is one device.

    Raises:
      ValueError: the rows of a device do not divide into parts.
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
    """Arrays (B, …) as (parts, B / parts, …)."""

    def split(x: jax.Array) -> jax.Array:
        if len(x) % parts:
            raise ValueError(f"the {len(x)} rows of a device are not divisible by {parts} microbatches")
        return x.reshape(parts, -1, *x.shape[1:])

    return _on_every_device(split, tree, PartitionSpec(axes), PartitionSpec(None, axes))


def _join(tree: Any, axes: tuple[str, ...]) -> Any:
    """Undoes `_split`."""

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    return _on_every_device(join, tree, PartitionSpec(None, axes), PartitionSpec(axes))


def _on_every_device(f: Callable[[jax.Array], jax.Array], tree: Any, was: PartitionSpec, becomes: PartitionSpec) -> Any:
    def local(tree: Any) -> Any:
        return jax.tree.map(f, tree)

    if jax.sharding.get_abstract_mesh().empty:
        return local(tree)
    return jax.shard_map(local, in_specs=was, out_specs=becomes)(tree)
