"""Soft trits and the bias of dead-zone weights against NumPy float64, in values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer, dead_zone_bias, fake_quantize, find_levels, initial_alpha, soft_quantize

LAMBDA = 1e-3
TEQUILA = Quantizer(group=32, dead_zone_bias=LAMBDA)
SOFT = ["factor", "twn", "least_squares"]
softened = pytest.mark.parametrize("kind", SOFT)
not_learned = pytest.mark.parametrize("kind", [*SOFT, "sherry"])


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def expanded(w: np.ndarray, quantizer: Quantizer, axis: int = -2) -> tuple[np.ndarray, np.ndarray]:
    """Scale and threshold of each weight."""
    levels = find_levels(jnp.asarray(w), quantizer, axis)
    return tuple(np.broadcast_to(np.float64(x), w.shape) for x in levels.expanded(w.shape[axis], axis))


def soft_float64(w: np.ndarray, scale: np.ndarray, threshold: np.ndarray, temperature: float) -> np.ndarray:
    """The expectation over the three trits, term by term."""
    trits = np.array([-1.0, 0.0, 1.0])
    x, delta = (w / scale)[..., None], (threshold / scale)[..., None]
    logits = 2 * (trits * x - delta * np.abs(trits)) / temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return scale * (p * trits).sum(-1) / p.sum(-1)


@softened
@pytest.mark.parametrize("temperature", [1.0, 0.4, 0.05])
def test_soft_weights_are_the_expectation_of_the_trit(kind: str, temperature: float) -> None:
    quantizer, w, g = Quantizer(kind=kind, group=32), weights(72, 5), np.float64(weights(72, 5, seed=1))
    made, pull = jax.vjp(jax.jit(lambda w: soft_quantize(w, quantizer, jnp.float32(temperature))), w)
    levels = expanded(w, quantizer)
    np.testing.assert_allclose(made, soft_float64(np.float64(w), *levels, temperature), rtol=1e-5, atol=1e-8)
    ahead, behind = (soft_float64(np.float64(w) + step, *levels, temperature) for step in (1e-8, -1e-8))
    np.testing.assert_allclose(pull(jnp.float32(g))[0], g * (ahead - behind) / 2e-8, rtol=2e-4, atol=1e-6)


def test_for_half_the_scale_the_exponent_is_the_squared_distance() -> None:
    """Hestia's softmax over −(x − t)² / τ."""
    w, quantizer = weights(64, 3), Quantizer(group=32)
    scale, _ = expanded(w, quantizer)
    trits = np.array([-1.0, 0.0, 1.0])
    p = np.exp(-(((np.float64(w) / scale)[..., None] - trits) ** 2) / 0.3)
    expected = scale * (p * trits).sum(-1) / p.sum(-1)
    np.testing.assert_allclose(soft_quantize(jnp.asarray(w), quantizer, jnp.float32(0.3)), expected, rtol=1e-5)


@softened
@pytest.mark.parametrize("axis", [-2, -1])
def test_temperature_zero_is_hard_to_the_bit_with_its_gradient(kind: str, axis: int) -> None:
    quantizer, w, upstream = Quantizer(kind=kind, group=32), jnp.asarray(weights(40, 40)), weights(40, 40, seed=1)
    hard, to_hard = jax.vjp(lambda w: fake_quantize(w, quantizer, axis), w)
    soft, to_soft = jax.vjp(lambda w: soft_quantize(w, quantizer, jnp.float32(0), axis), w)
    for a, b in ((hard, soft), (to_hard(upstream)[0], to_soft(upstream)[0])):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@softened
@pytest.mark.parametrize("axis", [-2, -1])
def test_the_limit_of_a_small_temperature_is_hard(kind: str, axis: int) -> None:
    quantizer, w = Quantizer(kind=kind, group=32), jnp.asarray(weights(72, 40))
    soft = soft_quantize(w, quantizer, jnp.float32(1e-6), axis)
    scale, threshold = expanded(np.asarray(w), quantizer, axis)
    assert (np.abs(np.abs(w) - threshold) > 1e-5 * scale).all()  # no weight lies on its threshold
    np.testing.assert_allclose(soft, fake_quantize(w, quantizer, axis), rtol=1e-6)


def test_a_threshold_per_weight_has_no_soft_trits() -> None:
    with pytest.raises(ValueError, match="the quantizer sherry has a threshold per weight: soft trits need one per"):
        soft_quantize(jnp.asarray(weights(8, 2)), Quantizer(kind="sherry"), jnp.float32(0.1))


@given(hnp.arrays(np.float32, (8, 2), elements=st.floats(-1, 1, width=32)), st.floats(2**-10, 4, width=32))
@settings(max_examples=60, deadline=None)
def test_soft_weights_are_finite_odd_and_within_the_scale(w: np.ndarray, temperature: float) -> None:
    w[:, 1] = 0

    def soft(w: Any) -> jax.Array:
        return soft_quantize(w, Quantizer(group=4), jnp.float32(temperature))

    made, gradient = soft(jnp.asarray(w)), jax.grad(lambda w: soft(w).sum())(jnp.asarray(w))
    assert np.isfinite(made).all() and np.isfinite(gradient).all() and not np.any(made[:, 1])
    np.testing.assert_allclose(soft(jnp.asarray(-w)), -made, rtol=1e-5, atol=1e-30)
    assert (np.abs(made) <= expanded(w, Quantizer(group=4))[0] * (1 + 1e-6)).all()


def dead_float64(w: np.ndarray, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """The bias, and which weights are dead."""
    _, threshold = expanded(w, quantizer)
    dead = np.abs(np.float64(w)) <= threshold
    return quantizer.dead_zone_bias * np.where(dead, np.float64(w), 0).sum(-2), dead


@not_learned
def test_the_bias_is_the_sum_of_dead_weights_and_gives_them_its_gradient(kind: str) -> None:
    quantizer, w = Quantizer(kind=kind, group=32, dead_zone_bias=0.25), weights(72, 5)
    expected, dead = dead_float64(w, quantizer)
    assert 0 < dead.mean() < 1
    upstream = weights(5, seed=2)
    bias, pull = jax.vjp(jax.jit(lambda w: dead_zone_bias(w, quantizer)), jnp.asarray(w))
    np.testing.assert_allclose(bias, expected, rtol=2**-15, atol=1e-8)
    np.testing.assert_allclose(pull(upstream)[0], np.where(dead, 0.25 * np.float64(upstream), 0), rtol=1e-6)


def test_a_learned_scale_decides_which_weights_are_dead_and_gets_no_gradient() -> None:
    quantizer, w = Quantizer(kind="lsq", group="channel", dead_zone_bias=0.5), jnp.asarray(weights(40, 3))
    alpha = initial_alpha(w, quantizer)
    to_w, to_alpha = jax.grad(lambda w, a: dead_zone_bias(w, quantizer, -2, a).sum(), (0, 1))(w, alpha)
    dead = np.abs(w) <= np.asarray(find_levels(w, quantizer, -2, alpha).threshold)
    np.testing.assert_array_equal(to_w, np.where(dead, np.float32(0.5), 0))
    assert not np.any(to_alpha)


def test_the_bias_has_equal_bits_under_jit_scan_and_sharding() -> None:
    w, bias = jnp.asarray(weights(2, 296, 8)), jnp.asarray(weights(8, seed=3))

    def added(w: jax.Array) -> jax.Array:
        return bias + dead_zone_bias(w, TEQUILA)

    expected, mesh = np.asarray(added(w)), make_mesh(1, 8)
    runs = {
        "jit": jax.jit(added)(w),
        "scan": jax.jit(lambda w: jax.lax.scan(lambda c, each: (c, added(each)), None, w)[1])(w),
        "numpy": np.asarray(bias) + np.asarray(dead_zone_bias(w, TEQUILA)),
        "outputs": jax.jit(added)(jax.device_put(w, jax.NamedSharding(mesh, P(None, None, "fsdp")))),
        "inputs": jax.jit(added)(jax.device_put(w, jax.NamedSharding(mesh, P(None, "fsdp", None)))),
    }
    for name, run in runs.items():
        np.testing.assert_array_equal(np.asarray(run).view(np.uint32), expected.view(np.uint32), err_msg=name)
