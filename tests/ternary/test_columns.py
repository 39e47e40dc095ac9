"""Column-sharded ternary weights give the product and the gradient of the whole weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from tclip_jax.ternary import matmul
from tclip_jax.ternary.columns import matmul_columns, repack_columns
from tclip_jax.ternary.matmul import ternary_matmul
from tclip_jax.ternary.quantizers import Quantizer, ternarize


def mesh_of(data: int, tensor: int) -> jax.sharding.Mesh:
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("activations", ["A32", "A16", "A8"])
def test_product_and_gradient_are_those_of_the_whole_weight(activations: Any) -> None:
    mesh = mesh_of(2, 4)
    w = ternarize(jax.random.normal(jax.random.key(0), (64, 40)), Quantizer(group=16))
    x = jax.random.normal(jax.random.key(1), (6, 64))
    packed = repack_columns(w, mesh, "tensor", implementation="reference")
    assert packed.layer_shape == (64, 10) and packed.data.shape == (16, 40)
    assert packed.data.sharding.shard_shape(packed.data.shape) == (16, 10)

    def loss(multiply: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        product = multiply(x)
        return (product**2).sum(), product

    def whole(x: jax.Array) -> jax.Array:
        return ternary_matmul(x, w, activations=activations)

    def shared(x: jax.Array) -> jax.Array:
        return matmul_columns(x, packed, mesh, "tensor", rows="data", activations=activations)

    (_, product), gradient = jax.jit(jax.value_and_grad(lambda x: loss(shared, x), has_aux=True))(x)
    (_, expected), expected_gradient = jax.value_and_grad(lambda x: loss(whole, x), has_aux=True)(x)
    assert product.sharding.shard_shape(product.shape) == (3, 10)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    if activations == "A32":
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_devices_sum_the_gradient_in_float32() -> None:
    mesh = mesh_of(1, 8)
    w = ternarize(jnp.ones((16, 8)), Quantizer(factor=1.0, group="channel"))
    packed = repack_columns(w, mesh, "tensor", implementation="reference")
    x = jnp.ones((1, 16), jnp.bfloat16)
    pull = jax.jit(jax.grad(lambda x: matmul_columns(x, packed, mesh, "tensor").astype(jnp.float32).sum()))
    program = pull.lower(x).as_text()
    sums = [line for line in program.splitlines() if "stablehlo.add" in line]
    assert "all_reduce" in program and sums and not any("bf16" in line for line in sums)
    np.testing.assert_array_equal(np.float32(pull(x)), np.full((1, 16), 8.0))


def test_refuses_columns_that_cannot_be_shared_out() -> None:
    w = ternarize(jnp.ones((16, 10)), Quantizer(group="channel"))
    with pytest.raises(ValueError, match="10 columns cannot be divided evenly among the 4 devices of axis 'tensor'"):
        repack_columns(w, mesh_of(2, 4), "tensor")
    with pytest.raises(ValueError, match="8 columns share one scale"):
        repack_columns(ternarize(jnp.ones((16, 8)), Quantizer(group="tensor")), mesh_of(2, 4), "tensor")


@pytest.mark.parametrize("rows", [16, 3])
def test_on_a_tpu_rows_are_spread_over_all_devices(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA for TPUs has no custom partitioning; the reference stands in for the TPU kernel."""
    monkeypatch.setattr(matmul, "traced_device", lambda: ("TPU v5 lite", "tpu"))
    w = ternarize(jax.random.normal(jax.random.key(0), (64, 40)), Quantizer(group=16))
    x = jax.random.normal(jax.random.key(1), (rows, 64))
    packed = matmul.repack(w, implementation="reference")
    with jax.set_mesh(mesh_of(2, 4)):
        product, pull = jax.vjp(jax.jit(lambda x: ternary_matmul(x, packed)), x)
        (gradient,) = pull(product)
    assert product.sharding.shard_shape(product.shape)[0] == (2 if rows == 16 else 3)
    expected = x @ w.dequantize()
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, expected @ w.dequantize().T, rtol=1e-4, atol=1e-4)
