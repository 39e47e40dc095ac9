from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from jax.sharding import PartitionSpec

from tclip_jax.models.layers import (
    Blend,
    Dense,
    Embedding,
    Latent,
    Softness,
    activate,
    layer_norm,
    multiply,
    normalize_embedding,
)
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.ternary import Quantizer, TernaryTensor, UniformTensor, fake_quantize, initial_alpha, quantize
from tclip_jax.ternary.gathering import Placement

RNG = np.random.default_rng(0)
QUANTIZERS = [
    Quantizer(group=8),
    Quantizer(1.0, "channel"),
    Quantizer(2.0, "tensor", 24),
    Quantizer(group=8, kind="uniform", bits=4),
    Quantizer(group="channel", kind="uniform", bits=8),
]
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda quantizer: quantizer.description)


def packed_weight(w: np.ndarray, quantizer: Quantizer, axis: int) -> TernaryTensor | UniformTensor:
    return jax.jit(quantize, static_argnums=(1, 2))(w, quantizer, axis)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_quantizer
def test_dense_is_the_same_in_training_and_packed(quantizer: Quantizer, dtype: jax.typing.DTypeLike) -> None:
    x, kernel, bias = (RNG.standard_normal(shape, np.float32) for shape in ((3, 20), (20, 7), (7,)))
    packed = packed_weight(kernel, quantizer, -2)
    layer = Dense(7, rules=(("kernel", quantizer),), dtype=dtype)
    training = jax.jit(layer.apply)({"params": {"kernel": kernel, "bias": bias}}, x)
    inference = jax.jit(layer.apply)({"params": {"kernel": packed, "bias": bias}}, x)
    assert training.dtype == inference.dtype == dtype
    np.testing.assert_array_equal(training, inference)
    scale = np.repeat(np.float64(packed.scale), packed.group, 0)[:20]
    expected = np.float64(x) @ (packed.integers * scale) + bias
    np.testing.assert_allclose(np.float64(training), expected, atol=1e-5 if dtype == jnp.float32 else 0.1)


def test_a_dense_of_several_parts_reshapes_no_float32_sum() -> None:
    """XLA for TPUs fuses the bias with the product only before a reshape, which else copies float32 in HBM."""
    layer = Dense(24, dtype=jnp.bfloat16, parts=3)
    x = jnp.asarray(RNG.standard_normal((4, 5, 20)), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    whole = Dense(24, dtype=jnp.bfloat16).apply(params, x)
    np.testing.assert_array_equal(layer.apply(params, x), whole.reshape(4, 5, 3, 8))
    for equation in jax.make_jaxpr(layer.apply)(params, x).eqns:
        for array in (each.aval for each in equation.outvars):
            assert array.dtype == jnp.bfloat16 or array.shape != (4, 5, 3, 8), equation


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_quantizer
def test_embedding_is_the_same_in_training_and_packed(quantizer: Quantizer, dtype: jax.typing.DTypeLike) -> None:
    table, tokens = RNG.standard_normal((11, 20), np.float32), np.array([[0, 10, 3], [3, 3, 7]], np.int32)
    packed = packed_weight(table, quantizer, -1)
    layer = Embedding(11, 20, rules=(("embedding", quantizer),), dtype=dtype)
    training = jax.jit(layer.apply)({"params": {"embedding": table}}, tokens)
    inference = jax.jit(layer.apply)({"params": {"embedding": packed}}, tokens)
    assert training.dtype == inference.dtype == dtype
    np.testing.assert_array_equal(training, inference)
    scale = np.repeat(np.asarray(packed.scale), packed.group, -1)[:, :20]
    np.testing.assert_array_equal(training, (packed.integers * scale)[tokens].astype(dtype))


def test_only_the_parameter_that_the_rule_names_is_quantized() -> None:
    x, kernel = RNG.standard_normal((3, 20), np.float32), RNG.standard_normal((20, 7), np.float32)
    params = {"params": {"kernel": kernel, "bias": np.zeros(7, np.float32)}}
    # A regex must match the whole path.
    unquantized = Dense(7, rules=(("kern", Quantizer()), ("bias", Quantizer()))).apply(params, x)
    np.testing.assert_array_equal(unquantized, Dense(7).apply(params, x))
    assert not np.array_equal(unquantized, Dense(7, rules=((".*", Quantizer()),)).apply(params, x))


@every_quantizer
def test_the_gradient_of_a_quantized_dense_is_straight_through(quantizer: Quantizer) -> None:
    x, kernel = RNG.standard_normal((3, 20), np.float32), RNG.standard_normal((20, 7), np.float32)
    layer = Dense(7, rules=(("kernel", quantizer),), use_bias=False)
    gradient = jax.grad(lambda w: (layer.apply({"params": {"kernel": w}}, x) ** 2).sum())(kernel)
    quantized = np.float64(fake_quantize(kernel, quantizer))
    np.testing.assert_allclose(gradient, 2 * x.T @ (x @ quantized), rtol=1e-4, atol=1e-4)


@every_quantizer
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_blend_is_between_the_float_and_the_quantized_weight(quantizer: Quantizer, share: float) -> None:
    x, kernel = RNG.standard_normal((3, 20), np.float32), RNG.standard_normal((20, 7), np.float32)
    layer = Dense(7, rules=(("kernel", quantizer),), use_bias=False)
    blended = layer.apply({"params": {"kernel": Blend(kernel, Softness(jnp.float32(share)))}}, x)
    quantized = np.float64(fake_quantize(kernel, quantizer))
    np.testing.assert_allclose(blended, np.float64(x) @ (share * quantized + (1 - share) * kernel), atol=1e-5)
    if share == 1:
        np.testing.assert_array_equal(blended, layer.apply({"params": {"kernel": kernel}}, x))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["factor", "twn", "lsq", "uniform"])
def test_no_quantized_weights_are_kept_for_the_backward_pass(
    kind: Literal["factor", "twn", "lsq", "uniform"], sharded: bool
) -> None:
    quantizer, weight = Quantizer(kind=kind, group=16, bits=4), RNG.standard_normal((64, 32), np.float32)
    alpha = initial_alpha(weight, quantizer) if quantizer.learned else None
    placement = Placement(PartitionSpec("fsdp", None), PartitionSpec(None, None)) if sharded else None

    def product(x: jax.Array, weight: jax.Array, alpha: jax.Array | None) -> jax.Array:
        return multiply(x, Latent(weight, weight.size, quantizer, -2, alpha, None, placement))

    with jax.set_mesh(make_mesh(fsdp=2) if sharded else make_mesh(devices=jax.devices()[:1])):
        _, transpose = jax.vjp(jax.jit(product), np.ones((3, 64), np.float32), weight, alpha)
    large = [np.asarray(kept) for kept in jax.tree.leaves(transpose) if kept.size >= weight.size]
    for each in large:
        np.testing.assert_array_equal(each, weight)


def test_gelu_is_torchs_and_openais() -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    exact = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.astype(float)]
    quick = [value / (1 + math.exp(-1.702 * value)) for value in x.astype(float)]
    np.testing.assert_allclose(activate(x, "gelu"), exact, atol=1e-6)
    np.testing.assert_allclose(activate(x, "quick_gelu"), quick, atol=1e-6)


def test_layer_norm_keeps_precision_far_from_zero() -> None:
    # E[x²] − E[x]² would be wrong in the first digit here.
    x = 1000 + RNG.standard_normal((4, 64), np.float32)
    scale, bias = RNG.standard_normal((2, 64), np.float32)

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return layer_norm("norm", 1e-5)(x)

    result = Normed().apply({"params": {"norm": {"scale": scale, "bias": bias}}}, x)
    wide = np.float64(x)
    standardised = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(result, standardised * scale + bias, atol=1e-3)


@given(st_numpy.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32).filter(lambda x: abs(x) > 1e-3)))
def test_embeddings_have_length_one_and_keep_their_direction(x: np.ndarray) -> None:
    wide = np.float64(x)
    np.testing.assert_allclose(
        normalize_embedding(jnp.asarray(x)), wide / np.linalg.norm(wide, axis=-1, keepdims=True), atol=1e-6
    )


def test_a_zero_embedding_stays_zero_with_a_finite_gradient() -> None:
    x = jnp.zeros((1, 4))
    gradient = jax.grad(lambda x: normalize_embedding(x).sum())(x)
    np.testing.assert_array_equal(normalize_embedding(x), x)
    assert np.isfinite(gradient).all()
