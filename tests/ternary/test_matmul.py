"""The ternary product against NumPy float64, with one suite for all implementations that run on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import (
    PackedTensor,
    Quantizer,
    TernaryTensor,
    choose,
    fake_quantize,
    gather_rows,
    initial_alpha,
    pack_rows,
    repack,
    ternarize,
    ternary_matmul,
    unpack,
)
from tclip_jax.ternary.kernels import kernel, native_cpu
from tclip_jax.ternary.kernels.reference import quantize_activations

needs_library = pytest.mark.skipif(not native_cpu.instruction_sets(), reason="the native library was not built")
IMPLEMENTATIONS = ["reference", "xla_int8", pytest.param("native_cpu", marks=needs_library)]
on_cpus = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
ACTIVATIONS = ["A32", "A16", "A8"]

Array = np.ndarray[Any, Any]


def draw(rows: int, length: int, columns: int, group: int | str, seed: int = 0) -> tuple[Array, TernaryTensor]:
    """Random activations and a ternary weight whose first column is all zero."""
    rng = np.random.default_rng(seed)
    size = length if group in ("channel", "tensor") else min(int(group), length)
    scale = (1, 1) if group == "tensor" else (-(-length // size), columns)
    trits = rng.integers(-1, 2, (length, columns), dtype=np.int8)
    trits[:, 0] = 0
    level = np.asarray(jnp.asarray(rng.uniform(0.01, 1, scale), jnp.bfloat16), np.float32)
    x = rng.standard_normal((rows, length), np.float32)
    return x, TernaryTensor(trits, level, size)  # type: ignore[arg-type]


def dense(w: TernaryTensor) -> Array:
    scale = np.float64(w.scale)
    return np.float64(w.trits) * (np.repeat(scale, w.group, 0)[: w.shape[0]] if len(scale) > 1 else scale)


def rounded(x: Array, activations: str) -> Array:
    """Each token as the product takes it: rounded to its levels, in the documented float32 steps, or as it is."""
    if activations == "A32":
        return np.float64(x)
    most = {"A16": 32767, "A8": 127}[activations]
    largest = np.abs(x).max(-1, keepdims=True)
    q = np.rint(x * (np.float32(most) / largest))
    return np.float64(q) * np.float64(largest) / most


def assert_close(result: Any, x: Array, weights: Array) -> None:
    """Check the float64 product within (K + 8) · 2⁻²⁴ · Σ|x·w|, the error bound of a float32 sum in any order."""
    bound = (len(weights) + 8) * 2.0**-24 * (np.abs(x) @ np.abs(weights)) + 1e-30
    assert (np.abs(np.float64(result) - x @ weights) <= bound).all()


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
@settings(max_examples=6)
@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 300),
    columns=st.integers(1, 70),
    group=st.sampled_from([1, 20, 48, 256, "channel", "tensor"]),
    seed=st.integers(0, 99),
)
@example(rows=1, length=1, columns=1, group="tensor", seed=0)
@example(rows=33, length=588, columns=33, group=256, seed=1)  # the patches of L/14, with a short last group
@example(rows=40, length=513, columns=32, group="channel", seed=2)  # two blocks of the native kernel and one more k
@example(rows=5, length=100, columns=64, group=100, seed=3)
def test_equals_float64(
    implementation: str, activations: Any, rows: int, length: int, columns: int, group: Any, seed: int
) -> None:
    x, w = draw(rows, length, columns, group, seed)
    packed = kernel(implementation).pack(w)
    result = jax.jit(ternary_matmul, static_argnames="activations")(x, packed, activations=activations)
    assert (result.shape, result.dtype) == ((rows, columns), jnp.float32)
    assert_close(result, rounded(x, activations), dense(w))


@on_cpus
@pytest.mark.parametrize("group", [20, 64, "channel", "tensor"])
def test_packing_keeps_trits_scales_and_layers(implementation: str, group: Any) -> None:
    layers = [draw(1, 100, 37, group, seed)[1] for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    module = kernel(implementation)
    packed = module.pack(stacked)
    assert (packed.layer_shape, packed.group, packed.layout) == ((100, 37), stacked.group, implementation)
    np.testing.assert_array_equal(module.unpack(packed), [dense(layer) for layer in layers])
    assert packed.shape == packed.trits.shape == (3, 100, 37)
    np.testing.assert_array_equal(packed.trits, stacked.trits)
    np.testing.assert_array_equal(packed.dequantize(), [dense(layer) for layer in layers])
    second = jax.tree.map(lambda leaf: leaf[1], packed)
    np.testing.assert_array_equal(module.unpack(second), dense(layers[1]))


@on_cpus
@pytest.mark.parametrize("group", [20, 64, "channel", "tensor"])
def test_unpack_gives_trits_and_scales(implementation: str, group: Any) -> None:
    layers = [draw(1, 100, 50, group, seed)[1] for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    unpacked = unpack(kernel(implementation).pack(stacked))
    assert unpacked.trits.dtype == jnp.int8 and unpacked.axis == -2
    np.testing.assert_array_equal(unpacked.trits, stacked.trits)
    np.testing.assert_array_equal(unpacked.dequantize(), stacked.dequantize())


def test_the_repr_has_shapes_and_no_numbers() -> None:
    w = draw(1, 100, 50, 20)[1]
    assert repr(w) == "TernaryTensor(int8[100, 50] trits, float32[5, 50] scale, group=20, axis=-2)"
    assert repr(jax.tree.map(lambda leaf: None, w)) == "TernaryTensor(None trits, None scale, group=20, axis=-2)"
    packed = repr(kernel("reference").pack(w))
    assert packed.startswith("PackedTensor(") and "scale, layer_shape=(100, 50), group=20, layout='reference'" in packed


def test_unpack_gives_a_table_with_its_scales() -> None:
    w = draw(1, 100, 50, 20)[1]
    table = TernaryTensor(w.trits, np.full((100, 3), 0.5, np.float32), 20, -1)  # type: ignore[arg-type]
    unpacked = unpack(pack_rows(table))
    np.testing.assert_array_equal(unpacked.trits, table.trits)
    np.testing.assert_array_equal(unpacked.scale, table.scale)
    assert unpacked.axis == -1


@on_cpus
def test_scales_of_any_bits_are_kept(implementation: str) -> None:
    w = draw(1, 40, 5, 20)[1]
    fine = TernaryTensor(w.trits, np.float32(w.scale) * np.float32(1.2345678), w.group)  # type: ignore[arg-type]
    module = kernel(implementation)
    np.testing.assert_array_equal(module.unpack(module.pack(fine)), fine.dequantize())


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_bfloat16_activations_give_bfloat16(implementation: str, activations: Any) -> None:
    x, w = draw(35, 96, 40, 32)
    narrow = jnp.asarray(x, jnp.bfloat16)
    result = ternary_matmul(narrow, kernel(implementation).pack(w), activations=activations)
    assert result.dtype == jnp.bfloat16
    wide = np.asarray(narrow, np.float32)
    expected = rounded(wide, activations) @ dense(w)
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=2e-2)


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_a_token_of_zeros_stays_zero_and_one_with_nan_spoils_no_other(implementation: str, activations: Any) -> None:
    x, w = draw(36, 64, 8, 32)
    x[3], x[5, 7] = 0, np.nan
    result = np.asarray(ternary_matmul(x, kernel(implementation).pack(w), activations=activations))
    np.testing.assert_array_equal(result[3], 0)
    assert np.isnan(result[5, 1:]).all() and np.isfinite(np.delete(result, 5, 0)).all()


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_gradient_to_x_is_that_of_the_exact_product(implementation: str, activations: Any) -> None:
    x, w = draw(34, 50, 24, 20)
    packed = kernel(implementation).pack(w)
    toward = np.random.default_rng(1).standard_normal((34, 24)).astype(np.float32)
    _, pull = jax.vjp(lambda x: ternary_matmul(x, packed, activations=activations), x)
    np.testing.assert_allclose(pull(toward)[0], toward @ dense(w).T, rtol=1e-5, atol=1e-5)
    each = jax.vmap(jax.grad(lambda row: ternary_matmul(row, packed, activations=activations) @ toward[0]))(x)
    np.testing.assert_allclose(each, np.broadcast_to(toward[0] @ dense(w).T, x.shape), rtol=1e-5, atol=1e-5)


@on_cpus
def test_leading_axes_jit_vmap_and_scan_are_one_product(implementation: str) -> None:
    x, _ = draw(36, 50, 50, 20)
    layers = [draw(1, 50, 50, 20, seed)[1] for seed in range(3)]
    stacked = kernel(implementation).pack(jax.tree.map(lambda *leaves: np.stack(leaves), *layers))
    first = jax.tree.map(lambda leaf: leaf[0], stacked)
    expected = ternary_matmul(x, first)
    boxed = x.reshape(3, 4, 3, 50)
    for product in (ternary_matmul, jax.jit(ternary_matmul), jax.vmap(ternary_matmul, (0, None))):
        np.testing.assert_array_equal(product(boxed, first), expected.reshape(3, 4, 3, 50))
    assert_close(jax.vmap(ternary_matmul, (None, 0))(x, stacked)[2], np.float64(x), dense(layers[2]))
    scanned = jax.lax.scan(lambda x, w: (ternary_matmul(x, w), None), x, stacked)[0]
    in_turn = x @ dense(layers[0]) @ dense(layers[1]) @ dense(layers[2])
    np.testing.assert_allclose(scanned, in_turn, atol=1e-5 * np.abs(in_turn).max())


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_rows_stay_sharded_over_a_mesh_and_sharded_weights_are_gathered(implementation: str, activations: Any) -> None:
    x, w = draw(16, 64, 64, 32)
    packed = kernel(implementation).pack(w)
    expected = ternary_matmul(x, packed, activations=activations)
    mesh = make_mesh(data=4, fsdp=2)
    product = jax.jit(lambda x, w: ternary_matmul(x, w, activations=activations))
    with jax.set_mesh(mesh):
        for rows in (("data", "fsdp"), "data", None):
            sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(rows)))
            for axis in (PartitionSpec(), PartitionSpec("fsdp")):
                spread = jax.tree.map(
                    lambda leaf, axis=axis: jax.device_put(
                        leaf, NamedSharding(mesh, axis if leaf.shape[0] % 2 == 0 else PartitionSpec())
                    ),
                    packed,
                )
                result = product(sharded, spread)
                assert result.sharding.is_equivalent_to(sharded.sharding, 2)
                if axis == PartitionSpec():  # nothing to gather, the rows of x neither
                    assert "all-gather" not in product.lower(sharded, spread).compile().as_text()
                np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "group", [16, "tensor", *(pytest.param(group, marks=pytest.mark.slow) for group in (48, "channel"))]
)
def test_trits_are_multiplied_as_in_training_to_the_bit(group: Any) -> None:
    x, w = jax.random.normal(jax.random.key(0), (3, 5, 100)), jax.random.normal(jax.random.key(1), (100, 7))
    quantizer = Quantizer(2.0, group)
    packed = ternarize(w, quantizer)
    np.testing.assert_array_equal(ternary_matmul(x, packed), x @ fake_quantize(w, quantizer))
    assert_close(ternary_matmul(x[0], packed, implementation="xla_int8"), np.float64(x[0]), dense(packed))


@pytest.mark.parametrize(("rows", "integers"), [(31, False), (32, True)])
def test_xla_multiplies_integers_from_32_rows_on(rows: int, integers: bool) -> None:
    x, w = draw(rows, 64, 8, 32)
    packed = kernel("xla_int8").pack(w)
    program = str(jax.make_jaxpr(lambda x: ternary_matmul(x, packed, activations="A8"))(x))
    assert ("preferred_element_type=int32" in program) is integers


def test_activations_of_zeros_have_a_level_above_zero() -> None:
    for bits, most in ((8, 127), (16, 32767)):
        rounded, level = quantize_activations(jnp.zeros((2, 8)), bits)  # type: ignore[arg-type]
        assert rounded.dtype == f"int{bits}" and not rounded.any()
        assert (level == np.float32(2.0**-100) / np.float32(most)).all()


@needs_library
def test_the_largest_integers_do_not_overflow() -> None:
    """All weights 1 and all activations at their largest magnitude, over whole blocks of the native kernel."""
    w = TernaryTensor(np.ones((1024, 33), np.int8), np.ones((4, 33), np.float32), 256)  # type: ignore[arg-type]
    x = np.outer([1, -1, 3], np.ones(1024)).astype(np.float32)
    for instructions in filter(None, native_cpu.instruction_sets()):
        for activations in ACTIVATIONS:
            product = native_cpu.matmul(x, native_cpu.pack(w), activations=activations, instructions=instructions)  # type: ignore[arg-type]
            np.testing.assert_allclose(product, np.outer([1024, -1024, 3072], np.ones(33)), rtol=1e-6)


def instruction_sets() -> list[Any]:
    names = [name for name in native_cpu.instruction_sets() if name]
    return [pytest.param(name, marks=needs_library) for name in names or ["portable"]]


@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize(("rows", "group"), [(1, 256), (13, 20), (250, "channel")])
def test_instruction_sets_agree(instructions: str, rows: int, group: Any) -> None:
    x, w = draw(rows, 300, 45, group)
    packed = native_cpu.pack(w)

    def product(activations: Any, instructions: str) -> Any:
        return native_cpu.matmul(jnp.asarray(x), packed, activations=activations, instructions=instructions)

    for activations in ("A16", "A8"):
        np.testing.assert_array_equal(product(activations, instructions), product(activations, "portable"))
    assert_close(product("A32", instructions), np.float64(x), dense(w))


@needs_library
def test_operands_that_do_not_fit_are_refused_by_the_native_kernel() -> None:
    x, w = draw(2, 64, 32, 32)
    packed = native_cpu.pack(w)
    short = PackedTensor(packed.data[:, :-1], packed.scale, packed.layer_shape, packed.group, packed.layout)
    with pytest.raises(jax.errors.JaxRuntimeError, match="operands do not fit together"):
        native_cpu.matmul(jnp.asarray(x), short, activations="A32")


def test_two_bits_a_weight_are_resident() -> None:
    _, w = draw(1, 768, 96, 256)
    for name in ("reference", "native_cpu") if native_cpu.instruction_sets() else ("reference",):
        packed = repack(w, implementation=name)
        assert packed.data.nbytes == 768 * 96 / 4


@on_cpus
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_])
def test_integers_are_refused(dtype: Any, implementation: str) -> None:
    """Integers would truncate the product, such as 0.25 to 0."""
    x, w = np.ones((3, 8), dtype), TernaryTensor(jnp.ones((8, 2), jnp.int8), jnp.full((1, 2), 0.25), 8)
    packed = repack(w, implementation=implementation)
    name = np.dtype(dtype).name
    calls = [
        lambda: ternary_matmul(x, packed),
        lambda: ternary_matmul(x, w),
        lambda: ternary_matmul(x, w, implementation=implementation),
        lambda: jax.jit(ternary_matmul)(x, w),
        lambda: w.dequantize(dtype),
        lambda: ternarize(x, Quantizer()),
        lambda: fake_quantize(x, Quantizer()),
        lambda: fake_quantize(x, Quantizer(kind="lsq"), alpha=w.scale),
        lambda: fake_quantize(x.astype(np.float32), Quantizer(), dtype=dtype),
        lambda: initial_alpha(x, Quantizer(kind="seq")),
        lambda: choose((8, 2), 8, dtype=dtype, implementation=implementation),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(TypeError, match=rf" is {name}: it must be floating, as float32 or bfloat16"):
            raise AssertionError(f"{number} gives {call()}")


def test_trits_and_rows_are_integers() -> None:
    floats = TernaryTensor(jnp.full((8, 4), 0.7), jnp.ones((1, 4)), 8)
    with pytest.raises(TypeError, match=r"^trits are float32: they must be integers"):
        repack(floats)
    with pytest.raises(ValueError, match=r"^trits are integers −1, 0 and .1, not float32"):
        pack_rows(TernaryTensor(floats.trits, jnp.ones((8, 1)), 4, -1))
    table = pack_rows(TernaryTensor(jnp.ones((8, 4), jnp.int8), jnp.ones((8, 1)), 4, -1))
    for index in (jnp.array([True, False]), jnp.array([1.0])):
        with pytest.raises(TypeError, match=r"the index of rows is (bool|float32): it must be of integers"):
            gather_rows(table, index)


@on_cpus
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_what_is_not_finite_stays_visible_in_its_row(activations: Any, implementation: str) -> None:
    x, w = draw(40, 64, 3, 32)
    w = TernaryTensor(np.ones_like(w.trits), w.scale, w.group)  # type: ignore[arg-type]
    x[3, 5], x[7, 9] = np.nan, np.inf
    packed = repack(w, activations=activations, implementation=implementation)
    finite = np.isfinite(ternary_matmul(x, packed)).all(axis=1)
    assert not finite[[3, 7]].any() and np.delete(finite, [3, 7]).all()


@on_cpus
def test_float64_is_what_jax_makes_of_it(implementation: str) -> None:
    x, w = draw(5, 64, 3, 32)
    packed = repack(w, implementation=implementation)
    result = ternary_matmul(np.float64(x), packed)  # type: ignore[arg-type]
    assert result.dtype == jnp.asarray(np.float64(1)).dtype
    np.testing.assert_array_equal(result, ternary_matmul(x, packed))


@on_cpus
def test_another_number_of_inputs_is_refused(implementation: str) -> None:
    _, w = draw(5, 64, 3, 32)
    for weight in (w, repack(w, implementation=implementation)):
        for shape in ((5, 63), (5, 65), ()):
            with pytest.raises(ValueError, match=r"its last axis must be the 64 inputs of the weight \(64, 3\)"):
                ternary_matmul(np.ones(shape, np.float32), weight)
