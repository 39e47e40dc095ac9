"""The mesh of devices and the sharding of a batch over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data` and `fsdp` over all devices; one of the sizes may be −1, the rest.

    Axes are Auto: Linen constraints assert under jax's default of Explicit axes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp]
    if sizes.count(-1) == 1 and all(size > 0 or size == -1 for size in sizes):
        rest = -int(np.prod(sizes))
        if len(devices) % rest == 0:
            sizes[sizes.index(-1)] = len(devices) // rest
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ValueError(f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices")
    return jax.make_mesh(sizes, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from each process's own rows.

    Raises:
      ValueError: the rows do not divide over the devices.
    """
    rows, devices = next(iter(batch.values())).shape[0] * jax.process_count(), mesh.size
    if rows % devices:
        raise ValueError(f"global batch {rows} is not divisible by {devices} devices")
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def constrain_batch(x: Any) -> Any:
    """Keeps the first axis of an activation over all devices of the mesh in force; without a mesh, `x` itself.

    Without it GSPMD reshards activations instead of gathering weights when parameters are sharded over `fsdp`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def constrain_replicated(x: Any) -> Any:
    """Keeps every array of a tree whole on each device of the mesh in force, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())
