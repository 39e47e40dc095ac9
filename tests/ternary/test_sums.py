"""Products of bfloat16 arrays with float32 sums, within a device and over devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary.sums import dense_product

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("columns", [(5,), (3, 7)])
def test_values_and_gradients(columns: tuple[int, ...], dtype: Any) -> None:
    x, g = (jnp.asarray(RNG.standard_normal(shape), dtype) for shape in ((4, 6, 16), (4, 6, *columns)))
    w = jnp.asarray(RNG.standard_normal((16, *columns)), jnp.float32)
    y, transpose = jax.vjp(jax.jit(dense_product), x, w)
    to_x, to_w = transpose(g)
    assert y.dtype == to_x.dtype == dtype and to_w.dtype == jnp.float32
    wide_x, wide_w, wide_g = (np.float64(each.astype(dtype)) for each in (x, w, g))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-5}
    np.testing.assert_allclose(np.float64(y), np.tensordot(wide_x, wide_w, 1), **close)
    axes = list(range(2, g.ndim)), list(range(1, w.ndim))
    np.testing.assert_allclose(np.float64(to_x), np.tensordot(wide_g, wide_w, axes), **close)
    # The tolerance of float32: the gradient is not rounded to bfloat16.
    np.testing.assert_allclose(to_w, np.tensordot(wide_x, wide_g, ([0, 1], [0, 1])), rtol=1e-5, atol=1e-5)
    narrow = jax.jit(lambda x, w, g: jax.vjp(lambda w: dense_product(x, w, dtype), w)[1](g)[0])(x, w, g)
    np.testing.assert_array_equal(narrow, to_w.astype(dtype).astype(jnp.float32))


def test_devices_add_what_bfloat16_does_not_hold() -> None:
    """Each device's part of the sum is 1 + 2⁻⁹, which bfloat16 would round to 1."""
    mesh = make_mesh()
    x = np.ones((8, 2, 4), np.float32)
    g = np.tile(np.float32([1, 2**-9])[:, None], (8, 1, 3))
    rows = NamedSharding(mesh, P(("data", "fsdp", "tensor")))
    with jax.set_mesh(mesh):
        on_x, on_g = (jax.device_put(jnp.asarray(each, jnp.bfloat16), rows) for each in (x, g))
        gradient = jax.jit(lambda x, w, g: jax.vjp(dense_product, x, w)[1](g)[1])(on_x, jnp.ones((4, 3)), on_g)
        narrow = jax.jit(lambda x, w, g: jax.vjp(lambda x, w: dense_product(x, w, jnp.bfloat16), x, w)[1](g)[1])
        rounded = narrow(on_x, jnp.ones((4, 3)), on_g)
    np.testing.assert_array_equal(gradient, np.full((4, 3), 8 + 2**-6, np.float32))
    np.testing.assert_array_equal(rounded, np.full((4, 3), 8, np.float32))


@pytest.mark.parametrize("backward", [False, True])
def test_devices_that_share_a_product_add_what_bfloat16_does_not_hold(backward: bool) -> None:
    """Devices share the inputs in the forward case and the outputs in the backward case.

    The sum is four times 1 + 2⁻⁹, minus 4.
    """
    mesh = make_mesh(1, 1, 8)
    parts = np.concatenate([np.tile(np.float32([1, 2**-9]), 4), np.tile(np.float32([-1, 0]), 4)])
    with jax.set_mesh(mesh):
        along = jax.device_put(jnp.asarray(parts[None], jnp.bfloat16), NamedSharding(mesh, P(None, "tensor")))
        if backward:
            w = jax.device_put(jnp.ones((1, 16)), NamedSharding(mesh, P(None, "tensor")))
            total = jax.jit(lambda x, w, g: jax.vjp(dense_product, x, w)[1](g)[0])(along[:, :1], w, along)
        else:
            w = jax.device_put(jnp.ones((16, 1)), NamedSharding(mesh, P("tensor", None)))
            total = jax.jit(dense_product)(along, w)
    np.testing.assert_array_equal(np.float32(total), [[2**-7]])
