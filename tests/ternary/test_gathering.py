"""Gathered weights are bit-identical to those of one device, and move in few bytes."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer, fake_quantize, initial_alpha
from tclip_jax.ternary.gathering import Placement, gather_float, look_up

OUTPUT = Placement(P(None, ("tensor", "fsdp")), P(None, None))
COLUMNS = Placement(P(None, ("tensor", "fsdp")), P(None, "tensor"))
ROWS = Placement(P("tensor", "fsdp"), P("tensor", None))
TABLE = Placement(P(("tensor", "fsdp"), None), P(None, None))
SIZE = {"f32": 4, "bf16": 2, "u8": 1, "s8": 1}


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    w = np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)
    w[:8] = 0  # groups of zeros
    return jnp.asarray(w)


def gathered(program: str) -> list[tuple[str, int]]:
    """dtype and bytes of the result of each all-gather in a compiled program."""
    matches = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", program)
    return [(dtype, SIZE[dtype] * math.prod(int(n) for n in shape.split(","))) for dtype, shape in matches]


@pytest.mark.parametrize(
    ("shape", "axis", "placement", "quantizer", "dtype"),
    [
        ((64, 16), -2, OUTPUT, Quantizer(group=16), jnp.float32),
        ((64, 16), -2, COLUMNS, Quantizer(group="channel"), jnp.bfloat16),
        ((64, 8), -2, ROWS, Quantizer(group=8), jnp.float32),
        ((12, 4), -2, ROWS, Quantizer(group=3, scale_bits=24), jnp.float32),  # 6 rows per shard do not fill whole bytes
        ((27, 8), -2, OUTPUT, Quantizer(group=8, scale_bits=11, kind="twn"), jnp.float32),
        ((64, 16), -2, OUTPUT, Quantizer(group="tensor"), jnp.bfloat16),
        ((16, 20), -1, TABLE, Quantizer(group=8, kind="least_squares"), jnp.bfloat16),
        ((64, 16), -2, OUTPUT, Quantizer(group=16, kind="lsq"), jnp.bfloat16),
        ((64, 8), -2, ROWS, Quantizer(group=8, kind="seq"), jnp.float32),
        ((12, 4), -2, ROWS, Quantizer(group=3, kind="uniform", bits=4), jnp.float32),  # 3 rows per shard, 2 to a byte
        ((64, 16), -2, COLUMNS, Quantizer(group="channel", kind="uniform", bits=8), jnp.bfloat16),
        ((64, 16), -2, OUTPUT, Quantizer(group=16, scale_bits=24, kind="uniform", bits=8), jnp.bfloat16),
        ((16, 20), -1, TABLE, Quantizer(group=8, kind="uniform", bits=4), jnp.bfloat16),
    ],
)
def test_weights_and_gradients_are_those_of_one_device(
    shape: tuple[int, int], axis: int, placement: Placement, quantizer: Quantizer, dtype: Any
) -> None:
    w, g = draw(shape), jnp.asarray(draw(shape, 1), dtype)
    alpha = initial_alpha(w, quantizer, axis) if quantizer.learned else None

    def both(w: jax.Array, alpha: jax.Array | None, placement: Placement | None) -> Any:
        quantized, transpose = jax.vjp(
            lambda w, alpha: fake_quantize(w, quantizer, axis, alpha, None, dtype, placement), w, alpha
        )
        return quantized, transpose(g)

    expected = jax.jit(both, static_argnums=2)(w, alpha, None)
    assert expected[0].dtype == dtype and expected[1][0].dtype == jnp.float32
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        stored = jax.device_put(w, jax.sharding.NamedSharding(mesh, placement.param_spec))
        actual = jax.jit(both, static_argnums=2)(stored, alpha, placement)
    assert not np.signbit(np.asarray(actual[0], np.float32)[np.asarray(actual[0]) == 0]).any()
    assert actual[1][0].sharding.is_equivalent_to(stored.sharding, 2)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("placement", "rows", "gather"), [(OUTPUT, 256, 4), (COLUMNS, 256, 2), (ROWS, 256, 2), (ROWS, 512, 2)]
)
def test_what_moves_is_two_bits_a_weight_and_the_scales(placement: Placement, rows: int, gather: int) -> None:
    mesh, w = make_mesh(2, 2, 2), draw((rows, 64))
    with jax.set_mesh(mesh):
        stored = jax.device_put(w, jax.sharding.NamedSharding(mesh, placement.param_spec))
        move = jax.jit(lambda w: fake_quantize(w, Quantizer(group=128), -2, None, None, jnp.bfloat16, placement))
        gathers = gathered(move.lower(stored).compile().as_text())
        floats = gathered(jax.jit(lambda w: gather_float(w, placement, jnp.bfloat16)).lower(stored).compile().as_text())
    part = rows * 64 * gather // 4  # number of weights that a device has after the gather
    assert sorted(dtype for dtype, _ in gathers)[-1] == "u8" and len(gathers) == 2
    assert dict(gathers)["u8"] == part // 4
    # CPUs have no bfloat16 collectives: scales and float weights take four bytes here, and two on a TPU.
    assert sum(size for _, size in gathers) == part // 4 + 4 * part // 128
    assert sum(size for _, size in floats) == 4 * part
    assert part // 4 + 2 * part // 128 <= 2 * part / 2


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_move_packed_too(bits: Any) -> None:
    mesh, w, quantizer = make_mesh(2, 2, 2), draw((256, 64)), Quantizer(group=128, kind="uniform", bits=bits)
    with jax.set_mesh(mesh):
        stored = jax.device_put(w, jax.sharding.NamedSharding(mesh, OUTPUT.param_spec))
        move = jax.jit(lambda w: fake_quantize(w, quantizer, -2, None, None, jnp.bfloat16, OUTPUT))
        gathers = gathered(move.lower(stored).compile().as_text())
    assert sorted(dtype for dtype, _ in gathers)[-1] == "u8" and len(gathers) == 2
    assert dict(gathers)["u8"] == 256 * 64 * bits // 8


@pytest.mark.parametrize("quantizer", [None, Quantizer(group=8), Quantizer(group=8, kind="uniform", bits=4)])
def test_rows_of_a_table_and_a_gradient_that_is_summed_in_full_precision(quantizer: Quantizer | None) -> None:
    table, mesh = draw((16, 20)), make_mesh(2, 2, 2)
    index = jnp.asarray([[3, 3, 15, 9], [3, 0, 3, 12]] * 64)
    g = jnp.full((*index.shape, 20), 1.0, jnp.bfloat16)  # bfloat16 holds integers up to 256 only

    def rows(table: jax.Array) -> jax.Array:
        return (table if quantizer is None else fake_quantize(table, quantizer, -1))[index].astype(jnp.bfloat16)

    with jax.set_mesh(mesh):
        stored = jax.device_put(table, jax.sharding.NamedSharding(mesh, TABLE.param_spec))
        actual, transpose = jax.vjp(
            lambda w: jax.jit(look_up, static_argnums=(2, 3, 4))(w, index, quantizer, TABLE, jnp.bfloat16), stored
        )
        (gradient,) = transpose(g)
    np.testing.assert_array_equal(actual, rows(table))
    np.testing.assert_array_equal(gradient, np.bincount(index.ravel(), minlength=16)[:, None] * np.ones(20, np.float32))


@pytest.mark.parametrize(("spec", "devices"), [(("tensor", "fsdp"), 4), ("fsdp", 2), ("tensor", 2), (None, 1)], ids=str)
def test_the_gradient_of_a_table_is_summed_where_it_is_stored(spec: Any, devices: int) -> None:
    table, mesh = draw((16, 20)), make_mesh(2, 2, 2)
    placement = Placement(P(spec, None), P(None, None), ("data", "fsdp"))
    index = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 5)), jnp.int32)
    g = jnp.asarray(draw((40, 20), 2).reshape(8, 5, 20))
    sharded = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        stored = jax.device_put(table, jax.sharding.NamedSharding(mesh, placement.param_spec))

        @jax.jit
        def gradient(table: jax.Array, index: jax.Array, g: jax.Array) -> jax.Array:
            rows = lambda table: look_up(table, index, None, placement, jnp.float32)  # noqa: E731
            return jax.vjp(rows, table)[1](g)[0]

        arguments = stored, jax.device_put(index, sharded), jax.device_put(g, sharded)
        actual, text = gradient(*arguments), gradient.lower(*arguments).compile().as_text()
    expected = np.zeros((16, 20))
    np.add.at(expected, np.asarray(index), np.asarray(g, np.float64))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert actual.addressable_shards[0].data.shape == (16 // devices, 20)
    if spec in ("fsdp", ("tensor", "fsdp")):
        reduced = re.findall(r"= f32\[([\d,]+)\]\S* all-reduce", text)
        assert "reduce-scatter" in text and reduced == [f"{16 // devices},20"]


def test_rows_that_the_devices_cannot_share_have_the_same_gradient() -> None:
    mesh, placement = make_mesh(2, 2, 2), Placement(P("fsdp", None), P(None, None), ("data", "fsdp"))
    index, g = jnp.asarray([[1, 2], [1, 7], [0, 1]]), jnp.ones((3, 2, 4))
    with jax.set_mesh(mesh):
        _, transpose = jax.vjp(lambda w: look_up(w, index, None, placement, jnp.float32), draw((8, 4)))
        (gradient,) = transpose(g)
    np.testing.assert_array_equal(gradient, np.bincount(index.ravel(), minlength=8)[:, None] * np.ones(4, np.float32))


def test_floats_move_in_the_dtype_they_are_used_in() -> None:
    w, mesh = draw((64, 16)), make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        stored = jax.device_put(w, jax.sharding.NamedSharding(mesh, OUTPUT.param_spec))
        actual, transpose = jax.vjp(jax.jit(lambda w: gather_float(w, OUTPUT, jnp.bfloat16)), stored)
        (gradient,) = transpose(jnp.ones_like(actual))
        text = jax.jit(lambda w: gather_float(w, OUTPUT, jnp.bfloat16)).lower(stored).as_text()
    np.testing.assert_array_equal(actual, w.astype(jnp.bfloat16))
    assert gradient.dtype == jnp.float32 and gradient.sharding.is_equivalent_to(stored.sharding, 2)
    # The cast precedes the first sharding constraint.
    assert re.search(r"convert.*?bf16>\n.*sharding_constraint", text)
