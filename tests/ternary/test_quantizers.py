"""The factor quantizer: bit-equal to NumPy float32, and bit-deterministic in every way of running it."""

from __future__ import annotations

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
from tclip_jax.ternary import QUANTIZERS, Quantizer, fake_quantize, initial_alpha, ternarize
from tclip_jax.ternary.sums import halving_sum
from tests.plugins import own_registries, register_stochastic

GRANULARITIES = (256, 64, 48, "channel", "tensor")


def numpy_sum(x: np.ndarray) -> np.float32:
    """`halving_sum` of a vector, in float32."""
    length = 1
    while length < len(x):
        length *= 2
    x = np.concatenate([x, np.zeros(length - len(x), np.float32)]).astype(np.float32)
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def numpy_ternarize(w: np.ndarray, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Trits and dequantised weights of a (K, N) kernel, group by group."""
    trits, dequantised = np.zeros(w.shape, np.int8), np.zeros(w.shape, np.float32)
    length, outputs = w.shape
    group = quantizer.group if isinstance(quantizer.group, int) else length

    def levels(total: np.float32, members: int) -> np.float32:
        scale = np.float32(total * np.float32(quantizer.factor / members))
        scale = {8: scale.astype(ml_dtypes.bfloat16), 11: np.float16(scale), 24: scale}[quantizer.scale_bits]
        return np.maximum(np.float32(scale), np.float32({8: 2**-17, 11: 2**-14, 24: 2**-14}[quantizer.scale_bits]))

    if quantizer.group == "tensor":
        total = numpy_sum(np.array([numpy_sum(np.abs(w[:, n])) for n in range(outputs)]))
        blocks = [(slice(None), slice(None), levels(total, w.size) if total else np.float32(0))]
    else:
        blocks = []
        for n in range(outputs):
            for start in range(0, length, group):
                part = np.abs(w[start : start + group, n])
                total = numpy_sum(part)
                scale = levels(total, len(part)) if total else np.float32(0)
                blocks.append((slice(start, start + group), slice(n, n + 1), scale))
    for rows, columns, scale in blocks:
        part = w[rows, columns]
        trits[rows, columns] = np.sign(part) * (np.abs(part) > scale / 2)
        dequantised[rows, columns] = trits[rows, columns] * scale
    return trits, dequantised


def bits(x: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


@pytest.mark.parametrize("group", GRANULARITIES)
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("scale_bits", [8, 11, 24])
def test_equals_numpy_to_the_bit(group: int | str, factor: float, scale_bits: int) -> None:
    w, quantizer = weights(588, 5), Quantizer(factor, group, scale_bits)  # type: ignore[arg-type]
    trits, dequantised = numpy_ternarize(w, quantizer)
    packed = ternarize(jnp.asarray(w), quantizer)
    np.testing.assert_array_equal(packed.trits, trits)
    np.testing.assert_array_equal(bits(packed.dequantize()), bits(dequantised))
    np.testing.assert_array_equal(bits(fake_quantize(jnp.asarray(w), quantizer)), bits(dequantised))


@pytest.mark.parametrize(
    "group",
    [group if group in (256, "tensor") else pytest.param(group, marks=pytest.mark.slow) for group in GRANULARITIES],
)
def test_equal_bits_under_jit_scan_vmap_transposition_and_sharding(group: int | str) -> None:
    quantizer = Quantizer(2.0, group)  # type: ignore[arg-type]
    w = jnp.asarray(weights(4, 768, 32))
    expected = bits(jnp.stack([fake_quantize(layer, quantizer) for layer in w]))

    def body(carry: None, layer: jax.Array) -> tuple[None, jax.Array]:
        return carry, fake_quantize(layer, quantizer)

    transposed = jax.jit(lambda w: fake_quantize(w.swapaxes(-1, -2), quantizer, -1).swapaxes(-1, -2))
    runs = {
        "jit": jax.jit(lambda w: fake_quantize(w, quantizer))(w),
        "scan": jax.jit(lambda w: jax.lax.scan(body, None, w)[1])(w),
        "vmap": jax.vmap(lambda w: fake_quantize(w, quantizer))(w),
        "transposed": transposed(w) if group != "tensor" else w,
        "packed": jax.jit(lambda w: ternarize(w, quantizer).dequantize())(w),
    }
    mesh = make_mesh(1, 8)
    for spec in (P(None, None, "fsdp"), P(None, "fsdp", None)):
        sharded = jax.device_put(w, jax.NamedSharding(mesh, spec))
        runs[str(spec)] = jax.jit(lambda w: fake_quantize(w, quantizer))(sharded)
    if group == "tensor":
        runs.pop("transposed")  # it sums over the outputs first, in another order
    for name, run in runs.items():
        np.testing.assert_array_equal(bits(run), expected, err_msg=name)


def test_embedding_rows_equal_the_whole_table() -> None:
    table, tokens = jnp.asarray(weights(100, 300)), jnp.array([[3, 99], [0, 3]])
    whole = fake_quantize(table, Quantizer(), -1)[tokens]
    np.testing.assert_array_equal(bits(fake_quantize(table[tokens], Quantizer(), -1)), bits(whole))


def test_short_last_group_is_the_mean_of_its_own_members() -> None:
    w = jnp.concatenate([jnp.full((256, 1), 4.0), jnp.full((76, 1), 0.5)])
    np.testing.assert_array_equal(ternarize(w, Quantizer(1.0)).scale[:, 0], [4.0, 0.5])


# Few shapes, because each new shape is compiled.
@given(
    st.sampled_from([(1, 1), (37, 3)]).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32))
    )
)
@settings(max_examples=60, deadline=None)
def test_levels_are_minus_one_zero_one_times_the_scale(w: np.ndarray) -> None:
    packed = ternarize(jnp.asarray(w), Quantizer(2.0, 16))
    assert set(np.unique(packed.trits)) <= {-1, 0, 1}
    assert np.all(np.asarray(packed.scale) >= 0) and np.all(np.isfinite(packed.scale))
    dequantised = np.asarray(packed.dequantize())
    np.testing.assert_array_equal(bits(dequantised), bits(fake_quantize(jnp.asarray(w), Quantizer(2.0, 16))))
    assert not np.signbit(dequantised[dequantised == 0]).any()


@given(hnp.arrays(np.float32, (32, 3), elements=st.floats(-1, 1, width=32)), st.integers(-3, 3))
@settings(max_examples=60, deadline=None)
def test_odd_and_equivariant_under_powers_of_two(w: np.ndarray, exponent: int) -> None:
    # Weights stay above the smallest scale, whose lower bound would break the equivariance.
    w = np.where(np.abs(w) < 2**-6, np.float32(2**-6), w)
    plain = ternarize(jnp.asarray(w), Quantizer())
    odd, scaled = ternarize(jnp.asarray(-w), Quantizer()), ternarize(jnp.asarray(w * 2.0**exponent), Quantizer())
    np.testing.assert_array_equal(odd.trits, -plain.trits)
    np.testing.assert_array_equal(scaled.trits, plain.trits)
    np.testing.assert_array_equal(bits(scaled.scale), bits(plain.scale * 2.0**exponent))


@pytest.mark.parametrize(
    ("factor", "zeros_gauss", "zeros_laplace"), [(1.0, 0.31, 0.39), (1.5, 0.45, 0.53), (2.0, 0.575, 0.632)]
)
def test_share_of_zeros_is_the_published_one(factor: float, zeros_gauss: float, zeros_laplace: float) -> None:
    rng = np.random.default_rng(0)
    for draw, expected in ((rng.standard_normal, zeros_gauss), (lambda n: rng.laplace(size=n), zeros_laplace)):
        w = draw((2048, 256)).astype(np.float32)
        assert np.mean(np.asarray(ternarize(jnp.asarray(w), Quantizer(factor)).trits) == 0) == pytest.approx(
            expected, abs=0.006
        )


def test_factor_k_again_keeps_the_trits_and_shrinks_the_scale() -> None:
    w = jnp.asarray(weights(256, 64))
    first = ternarize(w, Quantizer(2.0, 256, 24))
    second = ternarize(first.dequantize(), Quantizer(2.0, 256, 24))
    np.testing.assert_array_equal(second.trits, first.trits)
    kept = np.mean(np.asarray(first.trits) != 0, axis=0)
    np.testing.assert_allclose(second.scale[0] / first.scale[0], 2 * kept, rtol=1e-6)


@pytest.mark.parametrize("group", GRANULARITIES)
def test_gradient_is_straight_through(group: int | str) -> None:
    w, upstream = jnp.asarray(weights(300, 7)), jnp.asarray(weights(300, 7, seed=1))
    gradient = jax.grad(lambda w: jnp.sum(upstream * fake_quantize(w, Quantizer(2.0, group))))(w)  # type: ignore[arg-type]
    np.testing.assert_array_equal(gradient, upstream)


def test_scales_are_exact_in_half_precision() -> None:
    scale = np.asarray(ternarize(jnp.asarray(weights(512, 64) * 1e-4), Quantizer()).scale)
    assert scale.min() == 2.0**-17
    for dtype in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(scale.astype(dtype).astype(np.float32), scale)


@pytest.mark.parametrize("scale_bits", [8, 11, 24])
def test_scales_reach_as_far_as_float32(scale_bits: int) -> None:
    w, quantizer = jnp.asarray(weights(64, 3)), Quantizer(2.0, 32, scale_bits)  # type: ignore[arg-type]
    plain, huge = ternarize(w, quantizer), ternarize(w * jnp.float32(2.0**120), quantizer)
    np.testing.assert_array_equal(huge.scale, plain.scale * jnp.float32(2.0**120))
    np.testing.assert_array_equal(huge.trits, plain.trits)


def test_dequantising_to_bfloat16_is_exact() -> None:
    packed = ternarize(jnp.asarray(weights(512, 64)), Quantizer())
    np.testing.assert_array_equal(np.asarray(packed.dequantize(jnp.bfloat16), np.float32), packed.dequantize())


def test_zero_weights_have_a_zero_scale() -> None:
    packed = ternarize(jnp.zeros((16, 2)), Quantizer())
    assert not np.asarray(packed.trits).any() and not bits(packed.scale).any()


def _drop_small(x: float) -> float:
    return x if abs(x) >= 1e-6 else 0.0


@given(
    st.sampled_from([1, 2, 7, 300]).flatmap(
        # From 1e-6 on, so that no sum is subnormal: XLA takes those to be 0, NumPy does not.
        lambda size: hnp.arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32).map(_drop_small))
    )
)
@settings(max_examples=60, deadline=None)
def test_halving_sum_equals_numpy_and_is_a_sum(x: np.ndarray) -> None:
    total = np.asarray(halving_sum(jnp.asarray(x), 0))
    assert total.shape == (1,) and total[0] == numpy_sum(x)
    np.testing.assert_allclose(total[0], x.astype(np.float64).sum(), atol=1e-6 * np.abs(x).sum() + 1e-30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "above 0"),
        ((float("inf"),), "factor is inf: it must be above 0"),
        ((float("nan"),), "factor is nan: it must be above 0"),
        ((2.0, 0), "group is 0: it must be at least 1"),
        ((2.0, True), "group is True: it must be int or one of 'channel', 'tensor'"),
        ((2.0, "row"), "'channel'"),
        ((2.0, 256, 9), "must be one of 8, 11, 24"),
        ((2.0, 256, 8, 3), "kind is 3: it must be str"),
        ((2.0, 256, 8, "a\x1b"), "it must be a name"),
        ((2.0, 256, 8, "a", {"b": float("nan")}), "options is .*: it must be finite"),
        ((2.0, 256, 8, "a", {"b": "c"}), "options is .*: it must be"),
    ],
)
def test_refuses_impossible_values(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(*arguments)


def test_refuses_an_unknown_kind_when_it_is_used() -> None:
    unknown, w = Quantizer(kind="ttq"), jnp.ones((4, 4))
    for use in (
        lambda: ternarize(w, unknown),
        lambda: fake_quantize(w, unknown),
        lambda: initial_alpha(w, unknown),
        lambda: unknown.learned,
    ):
        with pytest.raises(ValueError, match="kind is 'ttq': it must be one of 'factor', 'twn'"):
            use()
    with pytest.raises(ValueError, match="options of kind factor has no 'wdth'"):
        ternarize(w, Quantizer(options={"wdth": 1.0}))


def test_the_record_of_a_quantizer_has_what_differs_from_none() -> None:
    plain, tequila = Quantizer(), Quantizer(dead_zone_bias=0.001)
    assert plain.to_dict() == {"factor": 2.0, "group": 256, "scale_bits": 8, "kind": "factor"}
    assert tequila.to_dict() == plain.to_dict() | {"dead_zone_bias": 0.001}
    assert Quantizer(**tequila.to_dict()) == tequila and tequila != plain
    assert tequila.description == "k=2 group=256 dead_zone_bias=0.001" and plain.description == "k=2 group=256"
    with pytest.raises(ValueError, match="dead_zone_bias is -1"):
        Quantizer(dead_zone_bias=-1.0)


def test_a_dead_zone_bias_is_refused_for_kinds_without_a_dead_zone_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"dead_zone_bias is 0.5, but the kind uniform has no trits: set it to 0.0"):
        Quantizer(kind="uniform", dead_zone_bias=0.5)
    later = Quantizer(kind="stochastic", dead_zone_bias=0.5)  # a plug-in that is not loaded yet
    with own_registries():
        register_stochastic()
        for use in (lambda: later.rule, lambda: Quantizer(kind="stochastic", dead_zone_bias=0.5)):
            with pytest.raises(ValueError, match=r"dead_zone_bias is 0.5, but the kind stochastic draws its trits at"):
                use()
        assert Quantizer(kind="stochastic").rule.random


def test_only_sherry_has_a_threshold_per_weight_also_in_groups_of_one() -> None:
    for group in (1, 4, "channel", "tensor"):
        per_weight = {kind for kind in QUANTIZERS if Quantizer(kind=kind, group=group).threshold_per_weight}  # type: ignore[arg-type]
        assert per_weight == {"sherry"}
