"""Tensor parallelism by output columns: a packed ternary weight that is sharded over one mesh axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tclip_jax.ternary.matmul import repack, ternary_matmul
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor


def repack_columns(w: TernaryTensor, mesh: Mesh, axis: str, **choice: Any) -> PackedTensor:
    """Pack a ternary weight with its columns sharded over a mesh axis.

    Each device packs its own columns for its own kernel.

    Args:
      w: trits int8 (..., K, N), with one scale per group or per channel.
      mesh: a mesh that has `axis`. The weight is replicated over its other axes.
      axis: name of the mesh axis that shards the columns.
      **choice: keyword arguments of `repack`.

    Returns:
      A `PackedTensor` whose arrays are sharded over `axis`. Its `shape` is that of one shard, (K, N / devices).

    Raises:
      ValueError: the number of devices along `axis` does not divide N, or all columns share one scale.
    """
    devices, columns = mesh.shape[axis], w.shape[-1]
    if columns % devices:
        raise ValueError(f"{columns} columns cannot be divided evenly among the {devices} devices of axis {axis!r}")
    if w.scale.shape[-1] != columns:
        raise ValueError(f"{columns} columns share one scale: to shard them over {axis!r}, each needs its own")
    spec = PartitionSpec(*[None] * (len(w.shape) - 1), axis)
    # Kernels do not track over which mesh axes their results vary, so the check is off.
    return jax.shard_map(lambda own: repack(own, **choice), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
        w
    )


def matmul_columns(
    x: jax.Array,
    w: PackedTensor,
    mesh: Mesh,
    axis: str,
    *,
    rows: str | tuple[str, ...] | None = None,
    activations: Activations | None = None,
) -> jax.Array:
    """Multiply activations by a weight from `repack_columns`: x · ŵ.

    The weight does not move. Each device reads all of K and computes its own columns. The gradient with respect to `x`
    is summed over `axis` in float32.

    Args:
      x: floats (M, K), with M sharded over `rows`.
      w: the packed weight of one layer.
      mesh: the mesh that `w` is packed for.
      axis: the mesh axis that shards the columns of `w`.
      rows: the mesh axes that shard M; None if M is replicated.
      activations: as in `ternary_matmul`.

    Returns:
      (M, N) in the dtype of `x`, with M sharded over `rows` and N over `axis`.
    """
    dtype = x.dtype
    # x enters as float32, so that its gradient is summed over devices in float32.
    return jax.shard_map(
        lambda own_x, own_w: ternary_matmul(own_x.astype(dtype), own_w, activations=activations),
        mesh=mesh,
        in_specs=(PartitionSpec(rows, None), PartitionSpec(None, axis)),
        out_specs=PartitionSpec(rows, axis),
        check_vma=False,
    )(x.astype(jnp.float32), w)
