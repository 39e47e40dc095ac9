"""The mesh of eight simulated devices, batches sharded over it, and activations that keep the batch's sharding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.parallel.mesh import (
    abstract_mesh,
    batch_sharding,
    constrain_batch,
    describe_run,
    device_record,
    make_mesh,
    shard_batch,
)

CONFIG = CLIPConfig(
    8,
    VisionConfig((16, 16), patch_size=8, width=16, layers=2, head_width=8),
    TextConfig(context_length=6, vocab_size=32, width=16, heads=2, layers=2),
)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(["neither", "data", "fsdp"]))
def test_a_size_of_minus_one_takes_the_remaining_devices(data: int, inferred: str) -> None:
    sizes = {"data": -1 if inferred == "data" else data, "fsdp": -1 if inferred == "fsdp" else 8 // data}
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == {"data": data, "fsdp": 8 // data, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_the_mesh_has_all_devices_or_the_chosen_ones() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert make_mesh(devices=jax.devices()[3:4]).devices.ravel().tolist() == jax.devices()[3:4]


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a device that a mesh reads."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    client: None = None


def chips(slices: int, processes: int) -> list[Any]:
    """Eight devices; those of one slice and of one process are not adjacent."""
    return [Chip(i, i % slices, i % processes) for i in range(8)]


def ids(mesh: Mesh) -> list[list[list[int]]]:
    return [[[device.id for device in row] for row in plane] for plane in mesh.devices]


@pytest.mark.parametrize(("slices", "device_slices", "processes"), [(-1, 2, 4), (2, 2, 1), (2, 1, 2)])
def test_data_spans_slices_or_processes_and_the_other_axes_do_not(
    slices: int, device_slices: int, processes: int
) -> None:
    mesh = make_mesh(4, 2, 1, slices, chips(device_slices, processes))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert ids(mesh) == [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]]
    assert ids(make_mesh(-1, 2, 2, slices, chips(device_slices, processes))) == [[[0, 2], [4, 6]], [[1, 3], [5, 7]]]


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((8, 1, 1, 2), chips(1, 1), "mesh slices=2: the devices belong to 1 slices and 1 processes"),
        ((8, 1, 1, 1), chips(2, 1), "mesh slices=1: the devices belong to 2 slices and 1 processes"),
        ((8, 1, 1, 4), chips(2, 4), "mesh slices=4: the devices belong to 2 slices and 4 processes"),
        ((1, 8, 1, -1), chips(2, 2), "mesh data=1 is not divisible by 2 slices: data is the axis between slices"),
    ],
)
def test_slices_that_do_not_fit_the_devices_or_the_data_axis(sizes: Any, devices: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_mesh(*sizes, devices)


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, -1), (-1, 0), (-2, -4), (4, 4), (16, -1)])
def test_the_error_of_sizes_that_do_not_fit_names_them(data: int, fsdp: int) -> None:
    with pytest.raises(ValueError, match=rf"^mesh data={data}, fsdp={fsdp}, tensor=1 does not fit 8 devices$"):
        make_mesh(data, fsdp)


def test_tensor_is_the_last_axis_and_named_in_the_error() -> None:
    assert ids(make_mesh(tensor=4)) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert make_mesh(2, 2, 2).shape == abstract_mesh(8, 2, -1, 2).shape
    with pytest.raises(ValueError, match=r"^mesh data=-1, fsdp=2, tensor=3 does not fit 8 devices$"):
        make_mesh(fsdp=2, tensor=3)


def test_the_first_lines_of_a_log() -> None:
    assert describe_run(make_mesh(2, 2, 2), 128) == (
        "process 0 of 1: 8 of 8 devices",
        "mesh data=2, fsdp=2, tensor=2 of cpu (cpu)",
        "global batch 128: 128 a process, 16 a device",
    )


def test_the_record_of_devices() -> None:
    assert device_record(make_mesh()) == {"kind": "cpu", "count": 8, "processes": 1, "slices": 1, "shape": []}

    class Chip:
        platform, device_kind = "tpu", "TPU v5 lite"

        def __init__(self, x: int, y: int, index: int) -> None:
            self.coords, self.slice_index, self.process_index = (x, y, 0), index, 2 * index + x // 2

    chips = [Chip(x, y, index) for index in range(2) for x in range(4) for y in range(2)]
    mesh: Any = type("", (), {"devices": np.array(chips).reshape(4, 2, 2)})
    assert device_record(mesh) == {"kind": "TPU v5 lite", "count": 16, "processes": 4, "slices": 2, "shape": [4, 2, 1]}


@pytest.mark.parametrize("sizes", [(4, 2), (2, 2, 2)])
def test_rows_of_a_batch_are_sharded_over_all_devices_in_order(sizes: tuple[int, ...]) -> None:
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "weight": np.arange(16, dtype=np.float32)}
    placed = shard_batch(batch, make_mesh(*sizes))
    for key, array in placed.items():
        assert array.dtype == batch[key].dtype
        shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
        assert len(shards) == 8
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, batch[key][2 * i : 2 * i + 2])


def test_rows_that_are_not_divisible_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^global batch 12 is not divisible by 8 devices$"):
        shard_batch({"weight": np.ones(12, np.float32)}, make_mesh())


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jnp.ones((4, 2))
    assert constrain_batch(x) is x
    with jax.set_mesh(jax.make_mesh((8,), ("other",), axis_types=(AxisType.Auto,))):
        assert constrain_batch(x) is x


def product(mesh: Mesh, constrained: bool) -> tuple[jax.Array, str]:
    """Returns x · W and its program. Rows of x are sharded over all devices, columns of W over fsdp: they conflict."""
    x_BK = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(16, 4), batch_sharding(mesh))
    w_KN = jax.device_put(np.eye(4, dtype=np.float32), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    f = jax.jit(lambda x, w: constrain_batch(x @ w) if constrained else x @ w)
    with jax.set_mesh(mesh):
        return f(x_BK, w_KN), f.lower(x_BK, w_KN).compile().as_text()


def test_a_constrained_product_gathers_weights_and_not_rows() -> None:
    mesh = make_mesh(4, 2)
    y_BN, program = product(mesh, constrained=True)
    assert y_BN.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert "all-gather" in program and "f32[4,4]" in program  # the whole of W
    np.testing.assert_array_equal(y_BN, np.arange(64.0).reshape(16, 4))


def test_fewer_rows_than_devices_are_accepted() -> None:
    # Evaluation in training uses the mesh, and a data set may have two classes with one caption each.
    with jax.set_mesh(make_mesh(4, 2)):
        y = jax.jit(lambda x: 2 * constrain_batch(x))(jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(y, 2 * np.arange(6.0).reshape(3, 2))


def constraints(sharded: bool) -> int:
    """Counts the sharding constraints of the model's program."""
    images, tokens = jnp.zeros((8, 16, 16, 3)), jnp.zeros((8, 6), jnp.int32)
    forward = jax.jit(lambda params, *batch: CLIP(CONFIG).apply({"params": params}, *batch))
    shapes = param_shapes(CONFIG)
    if not sharded:
        return forward.lower(shapes, images, tokens).as_text().count("sharding_constraint")
    with jax.set_mesh(make_mesh(8)):
        return forward.lower(shapes, images, tokens).as_text().count("sharding_constraint")


def test_the_model_constrains_its_activations() -> None:
    """Per tower: its input, and per block q/k/v, the heads' output, the hidden units and the output."""
    assert constraints(sharded=False) == 0
    assert constraints(sharded=True) == 2 * 5  # the scan over blocks has one body
