"""A ternary weight whose columns are shared out over one axis of a mesh (tensor parallelism by outputs)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tclip_jax.ternary.matmul import repack, ternary_matmul
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor


def repack_columns(w: TernaryTensor, mesh: Mesh, axis: str, **choice: Any) -> PackedTensor:
    """Each device's columns of `w`, repacked for its kind; `shape` of the result is that of one device's share.

    Args:
      w: (..., K, N) trits, with a scale per group or channel.
      mesh: has `axis`; the weight is repeated over its other axes.
      axis: the columns' axis.
      **choice: as `repack` takes.

    Raises:
      ValueError: N is no multiple of the devices along `axis`, or there is one scale for the tensor.
    """
    devices, columns = mesh.shape[axis], w.shape[-1]
    if columns % devices:
        raise ValueError(f"{columns} columns cannot be shared out evenly over the {devices} devices of axis {axis!r}")
    if w.scale.shape[-1] != columns:
        raise ValueError(f"{columns} columns share one scale: give each its own to share them out over {axis!r}")
    spec = PartitionSpec(*[None] * (len(w.shape) - 1), axis)
    # A kernel's result does not say over which axes it varies.
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
    """x · ŵ of a weight from `repack_columns`: (M, K) gives (M, N), whose columns stay on their devices.

    No weight moves; every device reads all of K. The gradient to x is summed over `axis`.

    Args:
      x: floats, M sharded over `rows`.
      w: one layer's weight.
      mesh, axis: those that `w` was repacked for.
      rows: axes of the mesh that M is sharded over.
      activations: as `ternary_matmul` takes.
    """
    dtype = x.dtype
    # In float32 and back, so that devices sum the gradient in that.
    return jax.shard_map(
        lambda own_x, own_w: ternary_matmul(own_x.astype(dtype), own_w, activations=activations),
        mesh=mesh,
        in_specs=(PartitionSpec(rows, None), PartitionSpec(None, axis)),
        out_specs=PartitionSpec(rows, axis),
        check_vma=False,
    )(x.astype(jnp.float32), w)
