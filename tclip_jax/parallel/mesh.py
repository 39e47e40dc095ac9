"""The device mesh, and the sharding of batches and activations over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# `data` and `fsdp` shard the rows of activations; `tensor` shards the matrix products of the same rows.
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 1) -> tuple[int, int, int]:
    """Return the sizes of `AXES`.

    Args:
      devices: number of devices.
      data: size of the axis `data`, which spans the slices. One of `data`, `fsdp` and `tensor` may be −1: the remaining
        devices.
      fsdp: size of the axis `fsdp`.
      tensor: size of the axis `tensor`.
      slices: number of TPU slices.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or `data` is not divisible by `slices`.
    """
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1 and all(size > 0 or size == -1 for size in sizes):
        rest = -math.prod(sizes)
        if devices % rest == 0:
            sizes[sizes.index(-1)] = devices // rest
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise ValueError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {devices} devices")
    if sizes[0] % slices:
        raise ValueError(f"mesh data={sizes[0]} is not divisible by {slices} slices: data is the axis between slices")
    return sizes[0], sizes[1], sizes[2]


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = -1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh with axes `data`, `fsdp` and `tensor`, of type Auto.

    Linen's sharding constraints fail on axes of type Explicit, jax's default.

    Args:
      data, fsdp, tensor: see `mesh_sizes`.
      slices: groups of devices with a slower network between them; `data` spans them. These are TPU slices, or
        processes if the devices have no slice index. −1: as many as the devices belong to.
      devices: default jax.devices().

    Raises:
      ValueError: the product of the sizes is not the number of devices, or the number of slices does not match them.
    """
    devices = jax.devices() if devices is None else devices
    device_slices = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    by_process = device_slices == 1 and slices == processes
    if slices not in (-1, device_slices) and not by_process:
        raise ValueError(
            f"mesh slices={slices}: the devices belong to {device_slices} slices and {processes} processes"
        )
    slices = device_slices if slices == -1 else slices
    sizes = mesh_sizes(len(devices), data, fsdp, tensor, slices)
    # Without splitting the axes of a TPU torus, many mesh shapes are impossible.
    split: dict[str, Any] = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, process_is_granule=by_process, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Return a mesh without devices, for computing shardings; see `mesh_sizes`."""
    return AbstractMesh(mesh_sizes(devices, data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over all axes, also `tensor`, so that processes load distinct rows."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays of the rows that each process holds.

    Raises:
      ValueError: the number of global rows is not divisible by the number of devices.
    """
    rows, sharding = next(iter(batch.values())).shape[0] * jax.process_count(), batch_sharding(mesh)
    if rows % mesh.size:
        raise ValueError(f"global batch {rows} is not divisible by {mesh.size} devices")
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def mesh_in_force() -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh` if it has `AXES`, otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def constrain(x: Any, *spec: str | tuple[str, ...] | None) -> Any:
    """Constrain the first axes of `x` to these mesh axes and replicate the others; a no-op without a mesh."""
    return x if mesh_in_force() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_batch(x: Any, *rest: str | None) -> Any:
    """Constrain the first axis of an activation to `data` and `fsdp`, and the others to `rest`.

    Without the constraint, GSPMD reshards activations instead of gathering weights that are sharded over `fsdp`.
    """
    return constrain(x, BATCH_AXES, *rest)


def constrain_replicated(x: Any) -> Any:
    """Constrain all arrays of a tree to be replicated, so that each process can read them; a no-op without a mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def device_record(mesh: Mesh) -> dict[str, Any]:
    """Return what the record of a run says about its devices.

    Returns:
      `kind`; `count` of all devices; `processes`; `slices`; `shape`, the chips of a TPU slice along each axis of its
      coordinates, empty for other devices.
    """
    devices = list(mesh.devices.flat)
    slices = [getattr(device, "slice_index", None) or 0 for device in devices]
    shape: list[int] = []
    if devices[0].platform == "tpu":
        first = [device for device, index in zip(devices, slices, strict=True) if index == slices[0]]
        shape = [len(set(axis)) for axis in zip(*(device.coords for device in first), strict=True)]
    return {
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": len({device.process_index for device in devices}),
        "slices": len(set(slices)),
        "shape": shape,
    }


def describe_run(mesh: Mesh, batch_size: int) -> tuple[str, ...]:
    """Return the first lines of a run's log: process, mesh and batch."""
    first, processes = mesh.devices.flat[0], jax.process_count()
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return (
        f"process {jax.process_index()} of {processes}: {len(mesh.local_devices)} of {mesh.size} devices",
        f"mesh {sizes} of {first.device_kind} ({first.platform})",
        f"global batch {batch_size}: {batch_size // processes} a process, {batch_size // mesh.size} a device",
    )
