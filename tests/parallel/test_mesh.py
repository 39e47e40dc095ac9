"""Eight simulated devices: the mesh, a batch's rows over it, and activations that stay where the batch is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.parallel.mesh import batch_sharding, constrain_batch, make_mesh, shard_batch

CONFIG = CLIPConfig(
    8,
    VisionConfig((16, 16), patch_size=8, width=16, layers=2, head_width=8),
    TextConfig(context_length=6, vocab_size=32, width=16, heads=2, layers=2),
)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(["both", "data", "fsdp"]))
def test_a_size_of_minus_one_is_the_rest(data: int, given: str) -> None:
    sizes = {"data": data if given != "fsdp" else -1, "fsdp": 8 // data if given != "data" else -1}
    mesh = make_mesh(**sizes)
    assert dict(mesh.shape) == {"data": data, "fsdp": 8 // data}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert mesh.devices.ravel().tolist() == jax.devices()


def test_the_default_is_every_device_or_those_given() -> None:
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert make_mesh(devices=jax.devices()[3:4]).devices.ravel().tolist() == jax.devices()[3:4]


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, -1), (-1, 0), (-2, -4), (4, 4), (16, -1)])
def test_a_mesh_that_does_not_fit_names_its_sizes_and_the_devices(data: int, fsdp: int) -> None:
    with pytest.raises(ValueError, match=rf"^mesh data={data}, fsdp={fsdp} does not fit 8 devices$"):
        make_mesh(data, fsdp)


def test_rows_of_a_batch_lie_over_all_devices_in_order() -> None:
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "weight": np.arange(16, dtype=np.float32)}
    placed = shard_batch(batch, make_mesh(4, 2))
    for key, array in placed.items():
        assert array.dtype == batch[key].dtype
        shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
        assert len(shards) == 8
        for i, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, batch[key][2 * i : 2 * i + 2])


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^global batch 12 is not divisible by 8 devices$"):
        shard_batch({"weight": np.ones(12, np.float32)}, make_mesh())


def test_without_a_mesh_nothing_is_constrained() -> None:
    x = jnp.ones((4, 2))
    assert constrain_batch(x) is x
    with jax.set_mesh(jax.make_mesh((8,), ("other",), axis_types=(AxisType.Auto,))):
        assert constrain_batch(x) is x


def product(mesh: Mesh, constrained: bool) -> tuple[jax.Array, str]:
    """x · W with rows over all devices and W's columns over fsdp: both want that axis. And the program."""
    x_BK = jax.device_put(np.arange(64.0, dtype=np.float32).reshape(16, 4), batch_sharding(mesh))
    w_KN = jax.device_put(np.eye(4, dtype=np.float32), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    f = jax.jit(lambda x, w: constrain_batch(x @ w) if constrained else x @ w)
    with jax.set_mesh(mesh):
        return f(x_BK, w_KN), f.lower(x_BK, w_KN).compile().as_text()


def test_a_constrained_product_gathers_weights_and_keeps_rows_where_they_are() -> None:
    mesh = make_mesh(4, 2)
    y_BN, program = product(mesh, constrained=True)
    assert y_BN.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert "all-gather" in program and "f32[4,4]" in program  # the whole of W
    np.testing.assert_array_equal(y_BN, np.arange(64.0).reshape(16, 4))


def test_rows_fewer_than_devices_are_left_to_the_compiler() -> None:
    # The loop evaluates under its mesh, and a data set may have two classes with one caption each.
    with jax.set_mesh(make_mesh(4, 2)):
        y = jax.jit(lambda x: 2 * constrain_batch(x))(jnp.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(y, 2 * np.arange(6.0).reshape(3, 2))


def constraints(sharded: bool) -> int:
    images, tokens = jnp.zeros((8, 16, 16, 3)), jnp.zeros((8, 6), jnp.int32)
    forward = jax.jit(lambda params, *batch: CLIP(CONFIG).apply({"params": params}, *batch))
    shapes = param_shapes(CONFIG)
    if not sharded:
        return forward.lower(shapes, images, tokens).as_text().count("sharding_constraint")
    with jax.set_mesh(make_mesh(4, 2)):
        return forward.lower(shapes, images, tokens).as_text().count("sharding_constraint")


def test_the_model_constrains_what_enters_and_leaves_every_block_of_both_towers() -> None:
    assert constraints(sharded=False) == 0
    assert constraints(sharded=True) == 4  # a scan's body is there once
