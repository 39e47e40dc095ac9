"""All kinds of quantizers: bit-equal to NumPy float32, their properties, and their published errors."""

from __future__ import annotations

import functools
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
from tclip_jax.ternary import Quantizer, TernaryTensor, fake_quantize, initial_alpha, ternarize
from tclip_jax.ternary.sums import prefix_sums, quotient

KINDS = ("factor", "twn", "least_squares", "lsq", "seq", "sherry")
GROUPS = ("tensor", 32, *(pytest.param(group, marks=pytest.mark.slow) for group in ("channel", 64, 128, 256)))
every_kind = pytest.mark.parametrize("kind", KINDS)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def bits(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> TernaryTensor:
    """Quantize with α at its initial value."""
    return ternarize(w, quantizer, axis, initial_alpha(w, quantizer, axis) if quantizer.learned else None)


def halving(x: np.ndarray) -> np.float32:
    x = np.concatenate([x, np.zeros((1 << max(len(x) - 1, 0).bit_length()) - len(x))]).astype(np.float32)
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def largest_quotient(total: np.float32, count: int) -> np.float32:
    q = np.float32(np.float64(total) / count)
    while q * np.float32(count) > total:
        q = np.nextafter(q, np.float32(0))
    while np.nextafter(q, np.float32(np.inf)) * np.float32(count) <= total:
        q = np.nextafter(q, np.float32(np.inf))
    return q


def levels_of(group: np.ndarray, kind: str, total: Any = halving) -> tuple[np.float32, np.float32]:
    """Scale (8 bits) and threshold of one group of weights."""

    def rounded(scale: Any) -> np.float32:
        return np.maximum(np.float32(np.float32(scale).astype(ml_dtypes.bfloat16)), np.float32(2**-17))

    magnitude, n = np.abs(group), group.size
    if kind == "seq":
        scale = rounded(magnitude.max() * np.float32(2 / 3))
    elif kind == "twn":
        threshold = total(magnitude) * np.float32(0.7 / n)
        kept = magnitude > threshold
        return rounded(largest_quotient(total(np.where(kept, magnitude, 0)), int(kept.sum()))), threshold
    elif kind == "least_squares":
        sums = np.sort(magnitude.reshape(-1))[::-1]
        shift = 1
        while shift < n:
            sums = sums + np.concatenate([np.zeros(shift, np.float32), sums[:-shift]])
            shift *= 2
        counts = np.arange(1.0, n + 1)
        best = np.argmax(sums * (counts**-0.5).astype(np.float32))
        scale = rounded(sums[best] * np.float32(1 / (best + 1)))
    else:
        scale = rounded(total(magnitude) * np.float32(2.0 / n))
    return scale, scale / 2


def three_of_four(w: np.ndarray) -> np.ndarray:
    """A kernel (K, N) without the smallest of every four weights of a column."""
    kept = w.copy()
    for start in range(0, len(w) - len(w) % 4, 4):
        for n in range(w.shape[1]):
            kept[start + np.argmin(np.abs(w[start : start + 4, n])), n] = 0
    return kept


def mean_of_nonzeros(kept: np.ndarray, total: Any = halving) -> np.float32:
    """Scale (8 bits) of the weights that are not zero."""
    mean = largest_quotient(total(np.abs(kept)), int(np.count_nonzero(kept)))
    return np.float32(mean.astype(ml_dtypes.bfloat16))


def numpy_dequantized(w: np.ndarray, quantizer: Quantizer) -> np.ndarray:
    """ŵ of a kernel (K, N), group by group."""
    result, (length, outputs) = np.zeros_like(w), w.shape
    if quantizer.kind == "sherry":
        kept = three_of_four(w)
        if quantizer.group == "tensor":
            by_column = mean_of_nonzeros(kept, lambda x: halving(np.array([halving(column) for column in x.T])))
            return np.sign(kept) * by_column
        group = quantizer.group if isinstance(quantizer.group, int) else length
        for n, start in ((n, start) for n in range(outputs) for start in range(0, length, group)):
            part = kept[start : start + group, n]
            result[start : start + group, n] = np.sign(part) * mean_of_nonzeros(part)
        return result
    if quantizer.group == "tensor":
        scale, threshold = levels_of(
            w, quantizer.kind, lambda x: halving(np.array([halving(column) for column in x.T]))
        )
        return np.where(np.abs(w) > threshold, np.copysign(scale, w), np.float32(0))
    group = quantizer.group if isinstance(quantizer.group, int) else length
    for n in range(outputs):
        for start in range(0, length, group):
            part = w[start : start + group, n]
            scale, threshold = levels_of(part, quantizer.kind)
            result[start : start + group, n] = np.where(np.abs(part) > threshold, np.copysign(scale, part), 0)
    return result


@every_kind
@pytest.mark.parametrize("group", [pytest.param("tensor", marks=pytest.mark.slow), *GROUPS[1:]])
def test_equal_bits_in_numpy_jit_eager_scan_and_shards(kind: str, group: Any) -> None:
    quantizer = Quantizer(2.0, group, 8, kind)  # type: ignore[arg-type]
    w = jnp.asarray(weights(2, 296, 8))  # the last group is short
    alpha = initial_alpha(w, quantizer) if quantizer.learned else None
    expected = bits(np.stack([numpy_dequantized(np.asarray(layer), quantizer) for layer in w]))
    np.testing.assert_array_equal(bits(fake_quantize(w, quantizer, -2, alpha)), expected)
    function = jax.jit(lambda w, alpha: fake_quantize(w, quantizer, -2, alpha))
    scanned = jax.jit(lambda w, a: jax.lax.scan(lambda c, each: (c, function(*each)), None, (w, a))[1])
    mesh = make_mesh(1, 8)
    runs = {
        "jit": function(w, alpha),
        "scan": scanned(w, alpha),
        "packed": quantized(w, quantizer).dequantize(),
        "output shards": function(jax.device_put(w, jax.NamedSharding(mesh, P(None, None, "fsdp"))), alpha),
        "input shards": function(jax.device_put(w, jax.NamedSharding(mesh, P(None, "fsdp", None))), alpha),
    }
    if group != "tensor":
        runs["rows"] = quantized(w.swapaxes(-1, -2), quantizer, -1).dequantize().swapaxes(-1, -2)
    for name, run in runs.items():
        np.testing.assert_array_equal(bits(run), expected, err_msg=name)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["twn", "least_squares", "lsq", "seq"])
def test_again_changes_nothing(kind: str, group: Any) -> None:
    quantizer, w = Quantizer(2.0, group, 8, kind), jnp.asarray(weights(296, 8))  # type: ignore[arg-type]
    alpha = initial_alpha(w, quantizer) if quantizer.learned else None
    once = fake_quantize(w, quantizer, -2, alpha)
    np.testing.assert_array_equal(bits(fake_quantize(once, quantizer, -2, alpha)), bits(once))


@every_kind
@given(hnp.arrays(np.float32, (32, 3), elements=st.floats(-1, 1, width=32)), st.integers(-3, 3))
@settings(max_examples=40, deadline=None)
def test_odd_and_equivariant_under_powers_of_two(kind: str, w: np.ndarray, exponent: int) -> None:
    # Weights stay above the smallest scale, whose lower bound would break the equivariance.
    w = np.where(np.abs(w) < 2**-6, np.float32(2**-6), w)
    quantizer = Quantizer(2.0, 32, 8, kind)  # type: ignore[arg-type]
    plain, odd, scaled = (quantized(each, quantizer) for each in (w, -w, w * np.float32(2.0**exponent)))
    np.testing.assert_array_equal(odd.trits, -np.asarray(plain.trits))
    np.testing.assert_array_equal(bits(odd.scale), bits(plain.scale))
    np.testing.assert_array_equal(scaled.trits, plain.trits)
    np.testing.assert_array_equal(bits(scaled.scale), bits(plain.scale * 2.0**exponent))


@pytest.mark.parametrize(
    ("kind", "factor", "gauss", "laplace"),
    [
        ("factor", 1.0, 0.264, 0.393),
        ("factor", 1.5, 0.191, 0.291),
        ("factor", 2.0, 0.230, 0.264),
        ("twn", 2.0, 0.192, 0.282),
        ("least_squares", 2.0, 0.190, 0.262),
        ("lsq", 2.0, 0.230, 0.264),  # α at its initial value
    ],
)
def test_error_is_no_worse_than_published(kind: str, factor: float, gauss: float, laplace: float) -> None:
    rng = np.random.default_rng(0)
    for draw, expected in ((rng.standard_normal, gauss), (lambda n: rng.laplace(size=n) / 2**0.5, laplace)):
        w = draw((2048, 64)).astype(np.float32)
        # The published errors are for known statistics, not 2,048 samples per channel. 0.001 covers their rounding.
        error = quantized(w, Quantizer(factor, "channel", 24, kind)).dequantize() - w  # type: ignore[arg-type]
        assert np.mean(np.square(error)) <= expected + 0.001 + 4 * np.std(np.square(error)) / w.size**0.5


def test_least_squares_is_the_best_of_all_thresholds() -> None:
    w = np.random.default_rng(1).laplace(size=(64, 5)).astype(np.float32)
    dequantized = np.asarray(quantized(w, Quantizer(2.0, "channel", 24, "least_squares")).dequantize(), np.float64)
    for n in range(5):
        magnitude, errors = np.sort(np.abs(np.float64(w[:, n])))[::-1], []
        for kept in range(1, 65):
            errors.append(np.sum(magnitude**2) - magnitude[:kept].sum() ** 2 / kept)
        assert np.sum((dequantized[:, n] - w[:, n]) ** 2) == pytest.approx(min(errors), rel=1e-6)


def test_equal_magnitudes_all_survive_and_zeros_have_no_scale() -> None:
    w = np.array([[0.5, 0.0]] * 7 + [[-0.5, 0.0]], np.float32)
    for kind in ("twn", "least_squares"):
        packed = quantized(w, Quantizer(2.0, "channel", 8, kind))  # type: ignore[arg-type]
        np.testing.assert_array_equal(packed.trits, np.sign(w))
        np.testing.assert_array_equal(bits(packed.scale), bits([[0.5, 0.0]]))


@every_kind
@pytest.mark.parametrize("group", ["tensor", 32])
def test_gradient_of_the_weight_and_of_its_learned_scale(kind: str, group: Any) -> None:
    quantizer = Quantizer(2.0, group, 24, kind)  # type: ignore[arg-type]
    w, upstream = weights(72, 5), weights(72, 5, seed=1)
    alpha = np.asarray(initial_alpha(w, quantizer)) * np.float32(0.8) if quantizer.learned else None
    # α is small enough that some weights are saturated.
    gradients = jax.grad(lambda w, a: jnp.sum(upstream * fake_quantize(w, quantizer, -2, a)), (0, 1))(w, alpha)
    if alpha is None:
        np.testing.assert_array_equal(gradients[0], upstream)
        return
    length = 72 if group == "tensor" else group
    scale = np.float64(alpha if group == "tensor" else np.repeat(alpha, length, 0)[:72])
    x, g = np.float64(w) / scale, np.float64(upstream)
    if kind == "lsq":
        inside, level = np.abs(x) < 1, np.round(np.clip(x, -1, 1))
        members = np.array([[72 * 5]]) if group == "tensor" else np.array([[32], [32], [8]])
    else:
        inside, level, members = np.abs(x) <= 0.99, np.round(np.clip(x, -0.99, 0.99) * 1.5) / 1.5, np.array([[360]])
    assert 0 < inside.mean() < 1
    of_scale = np.where(inside, level - x, np.sign(x)) * g
    starts = [0] if group == "tensor" else [0, 32, 64]
    sums = np.add.reduceat(of_scale, starts, 0)
    expected = (sums.sum(keepdims=True) if group == "tensor" else sums) / np.sqrt(members)
    np.testing.assert_array_equal(gradients[0], np.where(inside, upstream, 0))
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-6)


def test_a_weight_of_exactly_alpha_is_saturated() -> None:
    """Eq. 3 and 5 of arXiv 1902.08153 are strict: at |w| = α the weight gets 0, and α gets sign(w) / sqrt(n)."""
    w, alpha = jnp.array([[0.5], [-0.5], [0.375], [0.0]]), jnp.array([[0.5]])
    quantizer, upstream = Quantizer(2.0, "channel", 24, "lsq"), jnp.array([[1.0], [2.0], [4.0], [8.0]])
    to_w, to_alpha = jax.vjp(lambda w, a: fake_quantize(w, quantizer, -2, a), w, alpha)[1](upstream)
    np.testing.assert_array_equal(to_w, [[0.0], [0.0], [4.0], [8.0]])
    np.testing.assert_allclose(to_alpha, [[(1 - 2 + 4 * (1 - 0.75) + 8 * 0) / 4**0.5]], rtol=1e-6)


@pytest.mark.torch
def test_lsq_equals_the_papers_graph_in_torch() -> None:
    import torch

    def scaled(x: Any, factor: float) -> Any:  # the paper's gradscale
        return x.detach() - (x * factor).detach() + x * factor

    w, upstream = (torch.from_numpy(weights(60, 4, seed=seed)).double() for seed in (2, 3))
    step = torch.tensor([[0.025]], dtype=torch.float64)
    w.requires_grad_(), step.requires_grad_()
    s = scaled(step, w.numel() ** -0.5)
    clipped = torch.clamp(w / s, -1, 1)
    quantized_w = (clipped + (torch.round(clipped) - clipped).detach()) * s
    (quantized_w * upstream).sum().backward()
    quantizer, ours = Quantizer(2.0, "tensor", 24, "lsq"), [np.float32(each.detach().numpy()) for each in (w, step)]
    value, pull = jax.vjp(lambda w, a: fake_quantize(w, quantizer, -2, a), *ours)
    gradients = pull(jnp.asarray(upstream.numpy(), jnp.float32))
    np.testing.assert_allclose(value, quantized_w.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], w.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(gradients[1], step.grad.numpy(), rtol=1e-4)


def test_rows_of_a_table_share_the_gradient_scale_of_the_whole() -> None:
    table, tokens = jnp.asarray(weights(20, 40)), jnp.array([[3, 19], [0, 3]])
    quantizer = Quantizer(2.0, 32, 8, "seq")
    alpha = initial_alpha(table, quantizer, -1)

    def whole(table: jax.Array, alpha: jax.Array) -> jax.Array:
        return jnp.sin(30 * fake_quantize(table, quantizer, -1, alpha)[tokens]).sum()

    def rows(table: jax.Array, alpha: jax.Array) -> jax.Array:
        return jnp.sin(30 * fake_quantize(table[tokens], quantizer, -1, alpha[tokens], table.size)).sum()

    for a, b in zip(*(jax.jit(jax.grad(each, (0, 1)))(table, alpha) for each in (whole, rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_learned_scale_never_falls_below_the_smallest() -> None:
    w, quantizer = jnp.asarray(weights(32, 2)), Quantizer(2.0, "channel", 8, "lsq")
    packed = ternarize(w, quantizer, -2, jnp.array([[-1.0, 0.0]]))
    np.testing.assert_array_equal(packed.scale, [[2.0**-17] * 2])
    with pytest.raises(ValueError, match="lsq needs its learned scale"):
        ternarize(w, quantizer)


@given(st.lists(st.tuples(st.floats(0, 1e6, width=32), st.integers(1, 2**24)), min_size=7, max_size=7))
@settings(max_examples=60, deadline=None)
def test_quotient_is_the_largest_that_does_not_exceed(pairs: list[tuple[float, int]]) -> None:
    total, count = np.array(pairs, np.float32).T
    tiny = total < 1e-20  # their quotients may be subnormal and lack bits
    expected = [largest_quotient(t, int(c)) for t, c in zip(total, count, strict=True)]
    np.testing.assert_array_equal(np.where(tiny, 0, quotient(total, count)), np.where(tiny, 0, expected))


def test_prefix_sums_are_sums() -> None:
    x = np.random.default_rng(0).random((3, 37, 2))
    np.testing.assert_allclose(prefix_sums(np.float32(x), 1), np.cumsum(x, 1), rtol=1e-5)


@given(hnp.arrays(np.float32, (11, 2), elements=st.floats(-1, 1, width=32, allow_subnormal=False)))
@settings(max_examples=60, deadline=None)
def test_sherry_drops_the_first_smallest_of_each_four_and_keeps_a_short_rest(w: np.ndarray) -> None:
    w = np.where(np.abs(w) < 2**-10, np.float32(0), w)
    trits = np.asarray(quantized(w, Quantizer(kind="sherry", group=8)).trits)
    np.testing.assert_array_equal(trits, np.sign(three_of_four(w)))
    whole = trits[:8].reshape(2, 4, 2)
    assert ((whole == 0).sum(1) >= 1).all()
    assert ((whole == 0).sum(1) == 1)[(w[:8].reshape(2, 4, 2) != 0).all(1)].all()


@pytest.mark.parametrize("kind", ["factor", "twn", "least_squares", "sherry"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_value_that_is_not_finite_has_no_finite_weights(kind: Any, value: float) -> None:
    w = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    w[2, 1] = value
    made = ternarize(w, Quantizer(kind=kind, group=4)).dequantize()  # type: ignore[arg-type]
    finite = np.isfinite(made)
    assert not finite[:4, 1].any() and finite[4:].all() and finite[:, [0, 2]].all()
