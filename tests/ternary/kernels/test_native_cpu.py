"""What the native library does besides the plain product, against NumPy float64 on each instruction set of this CPU."""

from __future__ import annotations

import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tclip_jax.models.attention import attend
from tclip_jax.ternary import Quantizer, default_activations, ternarize
from tclip_jax.ternary.kernels import native_cpu

pytestmark = pytest.mark.skipif(not native_cpu.instruction_sets(), reason="the native library was not built")
SETS = [name for name in native_cpu.instruction_sets() if name] or ["portable"]
on_sets = pytest.mark.parametrize("instructions", SETS)

Array = np.ndarray[Any, Any]
FUNCTIONS: dict[Any, Any] = {
    None: lambda z: z,
    "gelu": lambda z: z * (1 + erf(z / np.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
}


@on_sets
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(
    ("rows", "length", "columns", "group"), [(1, 64, 32, 64), (50, 100, 45, 20), (13, 768, 7, 256)]
)
def test_dense_fuses_what_is_around_a_product(
    instructions: str, activation: Any, rows: int, length: int, columns: int, group: int
) -> None:
    rng = np.random.default_rng(0)
    w = ternarize(jax.random.normal(jax.random.key(1), (length, columns)), Quantizer(group=group))
    x, residual = (rng.standard_normal((rows, size)).astype(np.float32) for size in (length, columns))
    gain, shift = (rng.standard_normal(length).astype(np.float32) for _ in range(2))
    bias = rng.standard_normal(columns).astype(np.float32)
    result = native_cpu.dense(
        jnp.asarray(5 * x + 3),
        native_cpu.pack(w),
        activations="A32",
        norm=(jnp.asarray(gain), jnp.asarray(shift)),
        epsilon=1e-5,
        bias=jnp.asarray(bias),
        activation=activation,
        residual=jnp.asarray(residual),
        instructions=instructions,
    )
    wide = 5 * np.float64(x) + 3
    normal = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5) * gain + shift
    product = normal @ np.float64(w.dequantize()) + bias
    expected = FUNCTIONS[activation](product) + residual
    np.testing.assert_allclose(result, expected, atol=2e-6 * np.abs(product).max())


@on_sets
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "gelu_tanh"])
def test_activations_are_right_over_their_whole_range(instructions: str, activation: Any) -> None:
    """Through a product with the identity: 1 row for each value."""
    eye = ternarize(jnp.eye(32), Quantizer(group=32))
    w = jax.tree.map(jnp.asarray, native_cpu.pack(eye))
    level = float(eye.dequantize()[0, 0])
    z = np.concatenate([np.linspace(-12, 12, 4001), [-200, -30, 30, 200, 0]])
    x = np.zeros((len(z), 32), np.float32)
    x[:, 0] = z / level
    result = native_cpu.dense(jnp.asarray(x), w, activations="A32", activation=activation, instructions=instructions)
    exact = np.float64(x[:, 0]) * level
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(result[:, 0], FUNCTIONS[activation](exact), rtol=3e-7, atol=1e-6)


@on_sets
def test_absent_operands_change_nothing(instructions: str) -> None:
    w = native_cpu.pack(ternarize(jax.random.normal(jax.random.key(0), (64, 40)), Quantizer()))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    plain = native_cpu.matmul(x, w, activations="A8", instructions=instructions)
    zeros = native_cpu.dense(
        x, w, activations="A8", bias=jnp.zeros(40), residual=jnp.zeros((5, 40)), instructions=instructions
    )
    np.testing.assert_array_equal(plain, zeros)


ATTENTION = [  # batch, tokens, heads, channels of a head, causal
    (1, 1, 1, 64, False),
    (2, 77, 8, 64, True),
    (1, 50, 3, 32, False),
    (1, 197, 2, 64, False),
    (1, 257, 2, 80, True),
    (3, 33, 3, 20, True),
    (2, 16, 2, 128, False),
]


def qkv_of(batch: int, tokens: int, heads: int, size: int) -> Array:
    return np.random.default_rng(0).standard_normal((batch, tokens, 3 * heads * size)).astype(np.float32)


def reference(qkv: Any, heads: int, causal: bool) -> Any:
    q, k, v = np.moveaxis(np.asarray(qkv).reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
    return np.asarray(attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal)).reshape(*qkv.shape[:2], -1)


@on_sets
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_attention_equals_float64(instructions: str, shape: tuple[int, int, int, int, bool]) -> None:
    batch, tokens, heads, size, causal = shape
    qkv = qkv_of(batch, tokens, heads, size)
    q, k, v = np.moveaxis(np.float64(qkv).reshape(batch, tokens, 3, heads, size), 2, 0)
    scores = np.einsum("bthk,bshk->bhts", q, k) * size**-0.5
    weights = np.exp(np.where(np.tri(tokens, dtype=bool) | (not causal), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshk->bthk", weights, v).reshape(batch, tokens, heads * size)
    result = native_cpu.attention(jnp.asarray(qkv), heads, causal, instructions=instructions)
    np.testing.assert_allclose(result, expected, atol=3e-6)


@on_sets
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_integer_attention_is_off_by_2_to_the_minus_12(
    instructions: str, shape: tuple[int, int, int, int, bool]
) -> None:
    batch, tokens, heads, size, causal = shape
    qkv = qkv_of(batch, tokens, heads, size)
    result = native_cpu.attention(jnp.asarray(qkv), heads, causal, "A8", instructions)
    portable = native_cpu.attention(jnp.asarray(qkv), heads, causal, "A8", "portable")
    np.testing.assert_allclose(result, reference(qkv, heads, causal), atol=np.abs(qkv).max() * 2**-12)
    # A weight of 15 bits may be rounded to its other neighbour.
    np.testing.assert_allclose(result, portable, atol=np.abs(qkv).max() * 2**-15)


@on_sets
@pytest.mark.parametrize("tokens", [32, 4096])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_integer_attention_of_extreme_tokens_does_not_overflow(instructions: str, tokens: int, size: int) -> None:
    """Every product has the largest levels and one sign; weights are all alike, or one has everything."""
    qkv = np.ones((1, tokens, 3 * size), np.float32)
    result = native_cpu.attention(jnp.asarray(qkv), 1, False, "A8", instructions)
    np.testing.assert_allclose(result, 1, rtol=1e-6)
    qkv[0, 5, size : 2 * size] = 100
    qkv[0, 5, 2 * size :] = -3
    result = native_cpu.attention(jnp.asarray(qkv), 1, False, "A8", instructions)
    np.testing.assert_allclose(result, -3, rtol=1e-6)


@on_sets
@pytest.mark.parametrize("activations", ["A32", "A8"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_attention_shows_what_is_not_finite_as_jnp_does(
    instructions: str, activations: Any, causal: bool, part: str, value: float
) -> None:
    qkv = qkv_of(1, 30, 2, 16)
    qkv[0, 11, {"query": 3, "key": 35, "value": 70}[part]] = value
    result = native_cpu.attention(jnp.asarray(qkv), 2, causal, activations, instructions)
    tolerance = {"A32": 3e-6, "A8": 4 * 2**-12}[activations]  # the other head is finite
    np.testing.assert_allclose(result, reference(qkv, 2, causal), atol=tolerance)


@on_sets
def test_large_scores_do_not_overflow(instructions: str) -> None:
    qkv = 40 * qkv_of(1, 50, 2, 64)
    result = native_cpu.attention(jnp.asarray(qkv), 2, False, instructions=instructions)
    np.testing.assert_allclose(result, reference(qkv, 2, False), atol=40 * 2e-4)  # scores of 1e4 have 1e-3 in float32


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="operands do not fit together"):
        native_cpu.attention(jnp.ones((1, 4, 48)), 3, False)


def test_the_library_of_another_version_is_not_called(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `git pull` in an editable installation: its functions take other arguments."""
    (tmp_path / "old.cc").write_text('extern "C" void TclipTernaryMatmul() {}\n')
    monkeypatch.setattr(native_cpu, "LIBRARY", tmp_path / "old.so")
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(tmp_path / "old.so"), str(tmp_path / "old.cc")], check=True)
    monkeypatch.setattr(native_cpu, "instruction_sets", native_cpu.instruction_sets.__wrapped__)
    assert native_cpu.instruction_sets() == ()
    refusal = native_cpu.unsupported(platform="cpu", dtype=jnp.float32)
    assert refusal == native_cpu.NOT_BUILT and "this version" in refusal


def test_the_default_is_16_bits_where_they_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("", "avx2", "portable"))
    assert default_activations() == "A16" and default_activations("reference") == "A32"
    monkeypatch.setenv("TCLIP_IMPLEMENTATION", "xla_int8")
    assert default_activations() == "A32"
    monkeypatch.delenv("TCLIP_IMPLEMENTATION")
    for slow in (("", "", "portable"), ()):
        monkeypatch.setattr(native_cpu, "instruction_sets", lambda slow=slow: slow)
        assert default_activations() == "A32"
