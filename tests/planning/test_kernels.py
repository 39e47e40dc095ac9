"""Costs of Pallas kernels, calculated by hand."""

# ruff: noqa: E501
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from tclip_jax.planning.collectives import kernel_flops, memory_traffic
from tclip_jax.planning.hlo import parse_program
from tclip_jax.planning.kernels import KernelCost, kernel_costs


def product(x: jax.Array, y: jax.Array, *, trips: int = 1, order: str = "ij", name: str = "product") -> jax.Array:
    """x · y in blocks of 64 x 128, which the grid visits by rows or by columns."""

    def kernel(x_ref: Any, y_ref: Any, out_ref: Any) -> None:
        def body(_: Any, total: jax.Array) -> jax.Array:
            return total + jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        out_ref[...] = jax.lax.fori_loop(0, trips, body, jnp.zeros(out_ref.shape, jnp.float32))

    def at(*axes: str) -> Callable[..., tuple[Any, ...]]:
        return lambda *step: tuple(step[order.index(axis)] if axis in "ij" else 0 for axis in axes)

    grid = {"i": x.shape[0] // 64, "j": y.shape[1] // 128}
    return pl.pallas_call(
        kernel,
        grid=tuple(grid[axis] for axis in order),
        in_specs=[
            pl.BlockSpec((64, x.shape[1]), at("i", "k")),
            pl.BlockSpec((y.shape[0], 128), at("k", "j")),
        ],
        out_specs=pl.BlockSpec((64, 128), at("i", "j")),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], y.shape[1]), jnp.float32),
        name=name,
    )(x, y)


X, Y = jax.ShapeDtypeStruct((128, 100), jnp.bfloat16), jax.ShapeDtypeStruct((100, 384), jnp.bfloat16)
FLOPS = 2 * 128 * 384 * 128  # 100 is padded to 128


def costs_of(function: Callable[..., Any], *shapes: Any) -> Any:
    return kernel_costs(jax.make_jaxpr(function)(*shapes).jaxpr)


def test_a_block_that_is_read_again_counts_again() -> None:
    key = ("product", ((128, 384),))
    x, y, out = 64 * 128 * 2, 104 * 128 * 2, 64 * 128 * 4  # 100 lanes take 128, 100 rows take 104
    by_rows, by_columns = (
        costs_of(lambda x, y, order=order: product(x, y, order=order), X, Y) for order in ("ij", "ji")
    )
    assert by_rows == {key: KernelCost((2 * x, 2 * 3 * y), (6 * out,), FLOPS)}
    assert by_columns == {key: KernelCost((3 * 2 * x, 3 * y), (6 * out,), FLOPS)}


def test_loops_multiply_the_products_within() -> None:
    (cost,) = costs_of(lambda x, y: product(x, y, trips=5), X, Y).values()
    assert cost.flops == 5 * FLOPS


def test_float32_products_count_their_passes() -> None:
    x, y = (jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (X, Y))
    for precision, passes in (("default", 1), ("high", 3), ("highest", 6)):
        with jax.default_matmul_precision(precision):
            (wide,), (narrow,) = costs_of(product, x, y).values(), costs_of(product, X, Y).values()
        assert wide.flops == passes * FLOPS and narrow.flops == FLOPS


def test_kernels_are_found_within_scans_and_gradients() -> None:
    def step(x: jax.Array, y: jax.Array) -> Any:
        @jax.checkpoint
        def body(total: jax.Array, _: None) -> tuple[jax.Array, None]:
            return total + jax.jit(product)(x, y).sum(), None

        return jax.lax.scan(body, jnp.float32(0), None, length=3)[0]

    assert [name for name, _ in costs_of(step, X, Y)] == ["product"]


def test_two_costs_under_one_name_are_refused() -> None:
    def both(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x, y) + product(x, y, order="ji")

    with pytest.raises(ValueError, match=r"kernel product with results \(\(128, 384\),\) has two costs"):
        costs_of(both, X, Y)


def test_a_loop_without_a_fixed_end_is_refused() -> None:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        def body(total: jax.Array) -> jax.Array:
            return total + jnp.dot(x_ref[...], x_ref[...])

        out_ref[...] = jax.lax.while_loop(lambda total: total[0, 0] < 9, body, jnp.zeros((128, 128)))

    shape = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    with pytest.raises(ValueError, match="a loop of the kernel has no fixed number of steps"):
        costs_of(lambda x: pl.pallas_call(kernel, out_shape=shape, name="open")(x), shape)


CALL = """\
ENTRY %main (x: bf16[128,100], y: bf16[100,384]) -> f32[128,384] {
  %x = bf16[128,100]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[100,384]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %product.3 = f32[128,384]{1,0:T(8,128)} custom-call(%x, %y), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/product/pallas_call"}
}
"""


def test_a_compiled_program_moves_what_its_kernels_move_in_hbm() -> None:
    costs = {("product", ((128, 384),)): KernelCost((1000, 200), (30,), 4)}
    assert memory_traffic(parse_program(CALL), costs) == 1030  # y is on the chip
    assert kernel_flops(parse_program(CALL), costs) == 4


def test_a_kernel_without_a_cost_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"calls a kernel product with results \(\(128, 384\),\), which has no known cost"
    ):
        memory_traffic(parse_program(CALL), {})


def test_attention_by_hand() -> None:
    from tclip_jax.models.attention_tpu import fused_attention

    def both(qkv: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(lambda qkv: fused_attention(qkv, 64, False), qkv)[1](gradient)

    costs = costs_of(both, *(jax.ShapeDtypeStruct((128, 197, n * 768), jnp.bfloat16) for n in (3, 1)))
    one = 128 * 200 * 768 * 2
    scores, mixed = 2 * 200 * 256 * 128, 2 * 200 * 128 * 256  # q · kᵀ and weights · v, of 12 heads
    transposed = 2 * 200 * 128 * 256  # a product along the queries: 197 are padded to 256
    assert costs["attention", ((128, 197, 768),)] == KernelCost((one,) * 3, (one,), 128 * 12 * (scores + mixed))
    flops = 128 * 12 * (2 * scores + mixed + 2 * transposed)
    assert costs["attention_gradient", ((128, 197, 2304),)] == KernelCost((one,) * 4, (3 * one,), flops)
    assert np.isclose(flops / (128 * 12 * 5 * 2 * 197**2 * 64), 2.64, atol=0.01)  # over the formula of 5 products
