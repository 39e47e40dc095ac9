"""Uniform quantization: equal to NumPy, within half a step, bit-deterministic in every way of running it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer, UniformTensor, fake_quantize, initial_alpha, quantize, ternarize
from tclip_jax.ternary.packing import pack_fields, unpack_fields
from tclip_jax.ternary.uniform import check_integers, pack_uniform, round_to_integers

every_width = pytest.mark.parametrize("width", [4, 8])
every_group = pytest.mark.parametrize("group", [64, 48, "channel", "tensor"])


def uniform(width: int, group: Any = 64, scale_bits: Any = 8) -> Quantizer:
    return Quantizer(kind="uniform", bits=width, group=group, scale_bits=scale_bits)  # type: ignore[arg-type]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def numpy_scale(part: np.ndarray, largest: int, scale_bits: int) -> np.float32:
    scale = np.float32(np.abs(part).max() * np.float32(1 / largest))
    narrow = {8: scale.astype(ml_dtypes.bfloat16), 11: np.float16(scale), 24: scale}[scale_bits]
    smallest = {8: 2**-17, 11: 2**-14, 24: 2**-14}[scale_bits]
    return np.maximum(np.float32(narrow), np.float32(smallest)) if scale else np.float32(0)


def numpy_quantized(w: np.ndarray, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scale of each weight of a kernel (K, N): the quotients in float64, ties towards zero."""
    length, outputs = w.shape
    group = quantizer.group if isinstance(quantizer.group, int) else length
    starts = range(0, length, group)
    parts = [(slice(i, i + group), slice(n, n + 1)) for i in starts for n in range(outputs)]
    if quantizer.group == "tensor":
        parts = [(slice(None), slice(None))]
    integers, scales, largest = np.zeros(w.shape, np.int8), np.zeros(w.shape, np.float32), 2 ** (quantizer.bits - 1) - 1
    for part in parts:
        scales[part] = scale = numpy_scale(w[part], largest, quantizer.scale_bits)
        quotient = np.abs(np.float64(w[part])) / np.float64(scale or 1)
        integers[part] = np.sign(w[part]) * np.minimum(np.ceil(quotient - 0.5), largest)
    return integers, scales


@every_width
@every_group
@pytest.mark.parametrize("scale_bits", [8, 11])
def test_equals_numpy_to_the_bit(width: int, group: Any, scale_bits: int) -> None:
    w, quantizer = weights(140, 5), uniform(width, group, scale_bits)  # the last group is short
    integers, scales = numpy_quantized(w, quantizer)
    packed = quantize(jnp.asarray(w), quantizer)
    assert isinstance(packed, UniformTensor) and packed.shape == w.shape
    np.testing.assert_array_equal(packed.integers, integers)
    np.testing.assert_array_equal(bits(packed.dequantize()), bits(integers * scales))
    np.testing.assert_array_equal(bits(fake_quantize(jnp.asarray(w), quantizer)), bits(integers * scales))
    assert packed.data.nbytes == w.size * width // 8


@every_width
@every_group
@pytest.mark.parametrize("scale_bits", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_equal_bits_under_jit_scan_vmap_transposition_and_sharding(width: int, group: Any, scale_bits: int) -> None:
    quantizer, w = uniform(width, group, scale_bits), jnp.asarray(weights(2, 192, 8))
    expected = bits(jnp.stack([fake_quantize(layer, quantizer) for layer in w]))
    function = jax.jit(lambda w: fake_quantize(w, quantizer))
    runs = {
        "jit": function(w),
        "scan": jax.jit(lambda w: jax.lax.scan(lambda c, each: (c, function(each)), None, w)[1])(w),
        "vmap": jax.vmap(function)(w),
        "packed": jax.jit(lambda w: quantize(w, quantizer))(w).dequantize(),
        "rows": jax.jit(lambda w: quantize(w.swapaxes(-1, -2), quantizer, -1))(w).dequantize().swapaxes(-1, -2),
    }
    if group == "channel":
        runs.pop("rows")  # one scale a row is another granularity
        np.testing.assert_array_equal(bits(quantize(w.swapaxes(-1, -2), quantizer, -1).dequantize().mT), expected)
    mesh = make_mesh(1, 8)
    for spec in (P(None, None, "fsdp"), P(None, "fsdp", None)):
        runs[str(spec)] = function(jax.device_put(w, jax.NamedSharding(mesh, spec)))
    for name, run in runs.items():
        np.testing.assert_array_equal(bits(run), expected, err_msg=name)


@every_width
@given(
    st.sampled_from([(1, 1), (37, 3)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32, allow_subnormal=False))
    ),
    st.sampled_from([8, 24]),
)
@settings(max_examples=60, deadline=None)
def test_no_weight_is_further_than_half_a_step(width: int, w: np.ndarray, scale_bits: int) -> None:
    packed, quantizer = quantize(jnp.asarray(w), uniform(width, 16, scale_bits)), uniform(width, 16, scale_bits)
    made, step = (
        np.asarray(packed.dequantize(), np.float64),
        np.asarray(packed.scale, np.float64).repeat(16, 0)[: len(w)],
    )
    assert (np.abs(made - w) <= step / 2 * (1 + 2**-20)).all()
    assert np.abs(np.asarray(packed.integers)).max() <= 2 ** (width - 1) - 1
    assert not np.signbit(made[made == 0]).any()
    np.testing.assert_array_equal(bits(made), bits(fake_quantize(jnp.asarray(w), quantizer)))
    again = quantize(packed.dequantize(), quantizer)
    if scale_bits == 8:  # quantized weights are a fixed point, from which training continues
        np.testing.assert_array_equal(again.integers, packed.integers)
        np.testing.assert_array_equal(bits(again.dequantize()), bits(made))


@given(
    st.integers(1, 255).map(lambda mantissa: np.float32(mantissa * 2.0**-12)),
    st.lists(st.integers(0, 255), min_size=4, max_size=4),
    st.sampled_from([-1, 0, 1]),
)
@settings(max_examples=100, deadline=None)
def test_rounding_is_exact_at_and_beside_every_tie(scale: np.float32, halves: list[int], beside: int) -> None:
    """Weights half-way between two multiples, and their neighbours in float32, against fractions."""
    w = np.array(halves, np.float32) * scale / 2
    w = np.nextafter(w, np.float32(np.inf) * beside) if beside else w
    exact = [abs(Fraction(float(x))) / Fraction(float(scale)) for x in w]
    expected = [min(-(-(2 * x - 1) // 2), 127) for x in exact]  # ceil(x − 1/2)
    found = round_to_integers(jnp.asarray(w), jnp.asarray(scale), 127)
    np.testing.assert_array_equal(np.abs(found), np.maximum(np.array(expected, np.float32), 0))


@every_width
def test_gradient_is_straight_through_and_no_scale_is_learned(width: int) -> None:
    w, upstream = jnp.asarray(weights(300, 7)), jnp.asarray(weights(300, 7, seed=1))
    gradient = jax.grad(lambda w: jnp.sum(upstream * fake_quantize(w, uniform(width))))(w)
    np.testing.assert_array_equal(gradient, upstream)
    assert not uniform(width).learned
    with pytest.raises(ValueError, match="uniform has no learned scale"):
        initial_alpha(w, uniform(width))


@every_width
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_value_that_is_not_finite_has_no_finite_weights(width: int, value: float) -> None:
    w = weights(8, 3)
    w[2, 1] = value
    finite = np.isfinite(fake_quantize(jnp.asarray(w), uniform(width, 4)))
    assert not finite[:4, 1].any() and finite[4:].all() and finite[:, [0, 2]].all()


def test_zero_weights_have_a_zero_scale_and_tiny_ones_the_smallest() -> None:
    packed = quantize(jnp.asarray(np.array([[0, 1e-9]] * 4, np.float32)), uniform(8, 4))
    np.testing.assert_array_equal(bits(packed.scale), bits([[0, 2.0**-17]]))
    assert not bits(packed.dequantize()).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_are_the_rounded_products(dtype: Any) -> None:
    w = jnp.asarray(weights(64, 9))
    packed = quantize(w, uniform(8))
    np.testing.assert_array_equal(packed.dequantize(dtype), packed.dequantize().astype(dtype))
    np.testing.assert_array_equal(fake_quantize(w, uniform(8), dtype=dtype), packed.dequantize(dtype))
    with pytest.raises(TypeError, match="floating"):
        packed.dequantize(jnp.int8)


@every_width
@pytest.mark.parametrize("group", [8, "tensor"])
def test_rows_of_a_table_and_a_layer_of_a_stack(width: int, group: Any) -> None:
    table, index = quantize(jnp.asarray(weights(10, 21)), uniform(width, group), -1), jnp.array([[3, 9], [0, 3]])
    np.testing.assert_array_equal(table.rows(index).dequantize(), table.dequantize()[index])
    stack = quantize(jnp.asarray(weights(3, 21, 4)), uniform(width, group))
    one: Any = jax.tree.map(lambda leaf: leaf[1], stack)
    assert one.shape == (21, 4)
    np.testing.assert_array_equal(one.dequantize(), stack.dequantize()[1])


@given(st.sampled_from([2, 4, 8]), st.integers(0, 9), st.sampled_from([-1, -2, 0]), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_fields_are_unpacked_as_they_were_packed(width: int, length: int, axis: int, random: Any) -> None:
    shape = [2, 3, 4]
    shape[axis] = length
    size, low = int(np.prod(shape)), -(2 ** (width - 1))
    x = np.array([random.randint(low, -low - 1) for _ in range(size)], np.int8).reshape(shape)
    packed = pack_fields(x, width, axis)
    assert packed.dtype == np.uint8 and packed.shape[axis] == -(-length * width // 8)
    np.testing.assert_array_equal(unpack_fields(packed, width, length, axis), x)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_jax_packs_as_numpy_does(width: int) -> None:
    x = np.random.default_rng(0).integers(-(2 ** (width - 1)), 2 ** (width - 1), (2, 7, 3)).astype(np.int8)
    packed = pack_fields(jnp.asarray(x), width, -2)
    np.testing.assert_array_equal(packed, pack_fields(x, width, -2))
    np.testing.assert_array_equal(unpack_fields(packed, width, 7, -2), x)


def test_the_bytes_are_the_documented_ones() -> None:
    four = pack_uniform(np.array([[1], [-1], [7]], np.int8), np.ones((1, 1), np.float32), 4, 3, -2)
    np.testing.assert_array_equal(four.data[:, 0], [0xF1, 0x07])
    eight = pack_uniform(np.array([[1], [-1], [127]], np.int8), np.ones((1, 1), np.float32), 8, 3, -2)
    np.testing.assert_array_equal(eight.data[:, 0], [0x01, 0xFF, 0x7F])


def test_refuses_what_it_does_not_hold() -> None:
    with pytest.raises(ValueError, match="3 bytes do not hold 4 integers of 4 bits: expected 2"):
        unpack_fields(np.zeros(3, np.uint8), 4, 4)
    with pytest.raises(ValueError, match="integers of 4 bits are −7 to 7: found -8 to 0"):
        check_integers(np.array([-8, 0], np.int8), 4)
    with pytest.raises(ValueError, match="8 bits are float32: they must be of an integer dtype"):
        check_integers(np.zeros(2, np.float32), 8)
    with pytest.raises(ValueError, match=r"uniform bits=4 group=256 gives no trits: use tclip_jax\.ternary\.quantize"):
        ternarize(jnp.ones((4, 4)), Quantizer(kind="uniform", bits=4))
    with pytest.raises(ValueError, match="bits is 5: it must be one of 4, 8"):
        Quantizer(kind="uniform", bits=5)  # type: ignore[arg-type]


def test_the_record_of_a_quantizer_has_bits_only_where_they_matter() -> None:
    assert "bits" not in Quantizer().to_dict()
    for width in (4, 8):
        assert Quantizer(**uniform(width).to_dict()) == uniform(width)
