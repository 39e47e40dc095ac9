"""The fused attention in Pallas' interpreter against NumPy in float64, and compiled for TPUs."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.models import attention_tpu
from tclip_jax.models.attention_tpu import fused_attention, unsupported

RNG = np.random.default_rng(0)


def oracle(qkv: np.ndarray, gradient: np.ndarray, width: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Attention and the gradient of queries, keys and values, in float64."""
    batch, tokens, _ = qkv.shape
    split = np.float64(qkv).reshape(batch, tokens, 3, -1, width).transpose(2, 0, 3, 1, 4)
    q, k, v = split
    logits = q @ k.swapaxes(-1, -2) * width**-0.5
    if causal:
        logits = np.where(np.tri(tokens, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    g = np.float64(gradient).reshape(batch, tokens, -1, width).transpose(0, 2, 1, 3)
    to_weights = g @ v.swapaxes(-1, -2)
    to_logits = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True)) * width**-0.5
    parts = np.stack([to_logits @ k, to_logits.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g])
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
    return mixed, parts.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def check(batch: int, tokens: int, heads: int, width: int, causal: bool) -> None:
    qkv = RNG.standard_normal((batch, tokens, 3 * heads * width)).astype(np.float32)
    gradient = RNG.standard_normal((batch, tokens, heads * width)).astype(np.float32)
    assert unsupported(tokens, heads, width, jnp.float32) is None
    mixed, transpose = jax.vjp(lambda qkv: fused_attention(qkv, width, causal, True), qkv)
    expected, expected_gradient = oracle(qkv, gradient, width, causal)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    np.testing.assert_allclose(transpose(jnp.asarray(gradient))[0], expected_gradient, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "causal"),
    [
        (197, 2, 64, False),  # ViT-B/16
        (257, 2, 64, False),  # ViT-L/14
        (77, 2, 64, True),
        (50, 4, 32, False),
        (5, 16, 72, False),  # SO400M
        (5, 8, 80, True),  # ViT-H
        (9, 16, 104, False),  # ViT-bigG
        (6, 2, 128, True),
        (4, 2, 192, False),
        (3, 2, 384, True),
        (1, 2, 64, True),
    ],
)
def test_values_and_gradients_of_models(tokens: int, heads: int, width: int, causal: bool) -> None:
    check(2, tokens, heads, width, causal)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 6),
    tokens=st.integers(1, 20),
    heads=st.sampled_from([(4, 32), (2, 64), (4, 64), (8, 16), (8, 48)]),
    causal=st.booleans(),
)
def test_values_and_gradients_of_any_shape(batch: int, tokens: int, heads: tuple[int, int], causal: bool) -> None:
    check(batch, tokens, *heads, causal)


def test_bfloat16_is_near_float32() -> None:
    qkv = jnp.asarray(RNG.standard_normal((4, 20, 384)), jnp.bfloat16)
    gradient = jnp.asarray(RNG.standard_normal((4, 20, 128)), jnp.bfloat16)
    mixed, transpose = jax.vjp(lambda qkv: fused_attention(qkv, 64, False, True), qkv)
    expected, expected_gradient = oracle(np.float32(qkv), np.float32(gradient), 64, False)
    assert mixed.dtype == jnp.bfloat16 and transpose(gradient)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(mixed), expected, atol=0.02)
    np.testing.assert_allclose(np.float32(transpose(gradient)[0]), expected_gradient, atol=0.05)


def test_large_logits_stay_finite() -> None:
    qkv = np.float32(100 * RNG.standard_normal((1, 7, 384)))
    mixed, transpose = jax.vjp(lambda qkv: fused_attention(qkv, 64, True, True), qkv)
    expected, expected_gradient = oracle(qkv, np.ones((1, 7, 128)), 64, True)
    np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(transpose(jnp.ones((1, 7, 128)))[0], expected_gradient, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_stays_in_its_row(bad: float) -> None:
    qkv = RNG.standard_normal((4, 5, 384)).astype(np.float32)
    clean = np.asarray(fused_attention(jnp.asarray(qkv), 64, False, True))
    qkv[2, 3, 7] = bad
    mixed = np.asarray(fused_attention(jnp.asarray(qkv), 64, False, True))
    assert not np.isfinite(mixed[2]).all()
    np.testing.assert_array_equal(mixed[[0, 1, 3]], clean[[0, 1, 3]])


def test_shapes_that_the_kernels_cannot_take_have_a_reason() -> None:
    assert unsupported(17, 2, 32, jnp.float32) == "2 heads of 32 channels do not fill whole blocks of 128 lanes"
    assert unsupported(17, 12, 72, jnp.bfloat16) == "12 heads of 72 channels do not fill whole blocks of 1152 lanes"
    assert unsupported(17, 2, 64, jnp.float16) == "queries are bfloat16 or float32, not float16"
    assert "tokens of width 128 take" in str(unsupported(2048, 2, 64, jnp.bfloat16))


_COMPILE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from tclip_jax.models.attention_tpu import fused_attention, unsupported
from tclip_jax.parallel.mesh import make_mesh
name = sys.argv[1]
options = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
with jax.set_mesh(mesh := make_mesh(devices=topology.devices[:1])):
    for tokens, heads, width, causal in [(77, 8, 64, True), (197, 12, 64, False), (257, 16, 64, False),
                                         (257, 16, 80, False), (576, 16, 64, False), (729, 16, 72, False)]:
        if reason := unsupported(tokens, heads, width, jnp.bfloat16):
            print("refused", tokens, heads, width, reason)
            continue
        for dtype in (jnp.bfloat16, jnp.float32)[: 1 + (tokens < 200)]:
            def both(qkv, gradient):
                mixed, transpose = jax.vjp(lambda qkv: fused_attention(qkv, width, causal), qkv)
                return mixed, transpose(gradient)
            shapes = [jax.ShapeDtypeStruct((16, tokens, n * heads * width), dtype,
                                           sharding=NamedSharding(mesh, PartitionSpec())) for n in (3, 1)]
            text = jax.jit(both).lower(*shapes).compile().as_text()
            print("compiled", tokens, heads, width, jnp.dtype(dtype).name, text.count("tpu_custom_call"))
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_it_compiles_for_every_chip(topology: str) -> None:
    """What `unsupported` accepts fits VMEM, also where it is smallest."""
    process = subprocess.run([sys.executable, "-c", _COMPILE, topology], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [line.split() for line in process.stdout.splitlines() if line.startswith(("compiled", "refused"))]
    compiled = {(*map(int, line[1:4]), line[4]) for line in lines if line[0] == "compiled"}
    assert compiled >= {(197, 12, 64, "bfloat16"), (197, 12, 64, "float32"), (257, 16, 64, "bfloat16")}
    refused = {int(line[1]) for line in lines if line[0] == "refused"}
    too_large = {"v4": {576, 729}, "tpu7x": {576, 729}, "v5p": {729}}  # for the VMEM that the kernels may use
    assert refused == too_large.get(topology.partition(":")[0], set())


def test_rows_of_a_grid_step_divide_the_batch() -> None:
    for batch, tokens, rows in [(128, 197, 4), (128, 257, 2), (128, 77, 8), (7, 77, 7), (1, 2000, 1)]:
        (steps, _), blocks, _ = attention_tpu._blocks(jnp.zeros((batch, tokens, 384), jnp.bfloat16), 64)
        assert blocks[0].block_shape[0] == rows and steps * rows == batch
