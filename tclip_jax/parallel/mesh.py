"""The mesh of devices and the sharding of a batch over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# `data` and `fsdp` share the rows of activations; the devices along `tensor` share the products of the same rows.
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def mesh_sizes(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1, slices: int = 1) -> tuple[int, int, int]:
    """The sizes of `AXES` over so many devices; one of them may be −1, the rest. The data axis runs over slices.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or slices do not divide the data axis.
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
    """A mesh with axes `data`, `fsdp` and `tensor` over all devices; one of their sizes may be −1, the rest.

    Axes are Auto: Linen constraints assert under jax's default of Explicit axes.

    Args:
      slices: parts that a slower network connects, of which each holds a part of the data axis: slices of TPUs; where
        devices do not say theirs, processes. −1: as many as the devices say.
      devices: default jax.devices().

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or another number of slices than there are.
    """
    devices = jax.devices() if devices is None else devices
    found = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    by_process = found == 1 and slices == processes
    if slices not in (-1, found) and not by_process:
        raise ValueError(f"mesh slices={slices}: the devices are of {found} slices and {processes} processes")
    slices = found if slices == -1 else slices
    sizes = mesh_sizes(len(devices), data, fsdp, tensor, slices)
    # Splitting a torus' axis lets every shape that multiplies to the devices be a mesh.
    split: dict[str, Any] = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, **split)
    else:
        within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, process_is_granule=by_process, **split)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(devices: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """The mesh of devices that are not there: it has sizes, and shardings can be asked of it."""
    return AbstractMesh(mesh_sizes(devices, data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices, those along `tensor` too: each process reads its own, wherever its devices lie."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from each process's own rows.

    Raises:
      ValueError: the rows do not divide over the devices.
    """
    rows, sharding = next(iter(batch.values())).shape[0] * jax.process_count(), batch_sharding(mesh)
    if rows % mesh.size:
        raise ValueError(f"global batch {rows} is not divisible by {mesh.size} devices")
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def mesh_in_force() -> AbstractMesh | None:
    """The mesh of jax.set_mesh if it is one of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def constrain(x: Any, *spec: str | tuple[str, ...] | None) -> Any:
    """Keeps an array's axes over these of the mesh in force, and those not given whole; without a mesh, `x` itself."""
    return x if mesh_in_force() is None else jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_batch(x: Any, *rest: str | None) -> Any:
    """Keeps the first axis of an activation over `data` and `fsdp`, and the others over those given, if any.

    Without it GSPMD reshards activations instead of gathering weights when parameters are sharded over `fsdp`.
    """
    return constrain(x, BATCH_AXES, *rest)


def constrain_replicated(x: Any) -> Any:
    """Keeps every array of a tree whole on each device of the mesh in force, so that each process can read it."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


def describe_run(mesh: Mesh, batch_size: int) -> tuple[str, ...]:
    """What the first lines of a run's log say: the process, the mesh, and the batch."""
    first, processes = mesh.devices.flat[0], jax.process_count()
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return (
        f"process {jax.process_index()} of {processes}: {len(mesh.local_devices)} of {mesh.size} devices",
        f"mesh {sizes} of {first.device_kind} ({first.platform})",
        f"global batch {batch_size}: {batch_size // processes} a process, {batch_size // mesh.size} a device",
    )
