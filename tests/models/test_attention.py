"""Attention against NumPy in float64, over meshes, and the choice of its implementation."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.models import attention, attention_tpu
from tclip_jax.models.attention import attend, choose, explain_choice, self_attention
from tclip_jax.parallel.mesh import make_mesh

RNG = np.random.default_rng(0)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that makes a function believe that it is traced for another device."""

    def pretend(kind: str, platform: str) -> None:
        for module in (attention, attention_tpu):
            monkeypatch.setattr(module, "traced_device", lambda: (kind, platform))

    return pretend


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_softmax_of_scaled_products(causal: bool) -> None:
    q, k, v = RNG.standard_normal((3, 2, 7, 3, 4)).astype(np.float32)
    logits = np.einsum("bthk,bshk->bhts", np.float64(q), k) / 2
    logits = np.where(np.tri(7, dtype=bool), logits, -np.inf) if causal else logits
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(attend(q, k, v, causal), np.einsum("bhts,bshk->bthk", weights, v), atol=1e-6)
    narrow = [jnp.asarray(each, jnp.bfloat16) for each in (q, k, v)]
    result, expected = attend(*narrow, causal), jax.nn.dot_product_attention(*narrow, is_causal=causal)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(result), np.float32(expected), atol=0.02)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_the_kernel_over_a_mesh_equals_the_reference(
    sizes: dict[str, int], on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = jnp.asarray(RNG.standard_normal((8, 9, 3, 256)), jnp.float32)
    gradient = jnp.asarray(RNG.standard_normal((8, 9, 256)), jnp.float32)

    def both(qkv: jax.Array) -> tuple[jax.Array, Any]:
        mixed, transpose = jax.vjp(lambda qkv: self_attention(qkv, 4, True), qkv)
        return mixed, transpose(gradient)[0]

    expected, expected_gradient = both(qkv)
    on("TPU v5 lite", "tpu")
    fused = attention_tpu.fused_attention
    monkeypatch.setattr(attention_tpu, "fused_attention", lambda *values: fused(*values[:3], True))
    with jax.set_mesh(make_mesh(**sizes)):
        compiled = jax.jit(both).lower(qkv).compile()
        mixed, result = compiled(qkv)
    assert "all-" not in compiled.as_text()
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    np.testing.assert_allclose(result, expected_gradient, atol=1e-4)


def test_a_cpu_has_the_reference() -> None:
    assert choose((8, 197, 12, 64), jnp.bfloat16) == "reference"
    assert explain_choice((8, 197, 12, 64), jnp.bfloat16)[1] == "no fused attention is for platform cpu"
    assert explain_choice((8, 197, 12, 64), jnp.bfloat16, "reference") == ("reference", "forced")


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "name", "reason"),
    [
        (("TPU v5 lite", "tpu"), (8, 197, 12, 64), "bfloat16", "mosaic_tpu", "the first choice on this platform"),
        (("TPU v4", "tpu"), (8, 77, 8, 64), "float32", "mosaic_tpu", "the first choice on this platform"),
        (("TPU v5 lite", "tpu"), (8, 17, 2, 32), "bfloat16", "reference", "2 heads of 32 channels do not fill whole"),
        (("TPU v4", "tpu"), (8, 4096, 12, 64), "bfloat16", "reference", "4096 tokens of width 768 take"),
        (
            ("TPU v5 lite", "tpu"),
            (8, 197, 12, 64),
            "float16",
            "reference",
            "queries are bfloat16 or float32, not float16",
        ),
        (("NVIDIA H100", "gpu"), (8, 197, 12, 64), "bfloat16", "cudnn", "the first choice on this platform"),
        (
            ("NVIDIA H100", "gpu"),
            (8, 197, 12, 64),
            "float32",
            "reference",
            "queries are bfloat16 or float16, not float32",
        ),
        (("AMD Instinct MI300X", "gpu"), (8, 197, 12, 64), "bfloat16", "reference", "not for AMD Instinct MI300X"),
        (("NVIDIA H100", "gpu"), (8, 197, 12, 68), "bfloat16", "reference", "a multiple of 8, not 68"),
    ],
)
def test_the_choice_depends_on_device_and_shapes(
    device: tuple[str, str], shape: tuple[int, int, int, int], dtype: str, name: str, reason: str, on: Any
) -> None:
    on(*device)
    chosen, why = explain_choice(shape, dtype)
    assert chosen == name and reason in why


def test_rows_that_the_devices_cannot_share_take_the_reference(on: Any) -> None:
    on("TPU v5 lite", "tpu")
    with jax.set_mesh(make_mesh(data=8)):
        assert explain_choice((12, 197, 12, 64), jnp.bfloat16) == (
            "reference",
            "not mosaic_tpu: 12 rows are not divisible by 8 devices",
        )
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert "the mesh has the axes x" in explain_choice((16, 197, 12, 64), jnp.bfloat16)[1]


def test_a_choice_is_logged_once_where_there_is_one(caplog: pytest.LogCaptureFixture, on: Any) -> None:
    attention._log.cache_clear()
    with caplog.at_level(logging.INFO):
        choose((2, 5, 2, 32), jnp.float32)
        assert not caplog.records
        on("TPU v4", "tpu")
        for _ in range(2):
            choose((2, 5, 2, 32), jnp.float32)
    message = (
        "attention (TPU v4, 5 tokens, 2 heads of 32, float32): reference (not mosaic_tpu: 2 heads of 32 channels do not"
        " fill whole blocks of 128 lanes)"
    )
    assert [record.getMessage() for record in caplog.records] == [message]


def test_a_forced_implementation_that_cannot_run_is_refused(on: Any) -> None:
    with pytest.raises(ValueError, match=r"'mosaic_tpu' cannot serve 197 tokens, 12 heads of 64 on .*platform cpu"):
        choose((8, 197, 12, 64), jnp.bfloat16, "mosaic_tpu")
    with pytest.raises(ValueError, match="no attention 'flash': there are auto, reference, mosaic_tpu, cudnn"):
        choose((8, 197, 12, 64), jnp.bfloat16, "flash")
    on("TPU v4", "tpu")
    with pytest.raises(ValueError, match=r"4096 tokens, 12 heads of 64 on TPU v4: .* take \d+ of 16 MiB of VMEM"):
        choose((8, 4096, 12, 64), jnp.bfloat16, "mosaic_tpu")


@pytest.mark.parametrize(("length", "causal"), [(6, False), (5, False), (5, True)])
def test_gpus_call_cudnn_with_an_even_number_of_tokens(
    length: int, causal: bool, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    library = jax.nn.dot_product_attention

    def xla(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str, **options: Any) -> jax.Array:
        assert implementation == "cudnn"
        calls.append(q.shape)
        return library(q, k, v, implementation="xla", **options)

    qkv = jnp.asarray(RNG.standard_normal((2, length, 3, 32)), jnp.bfloat16)
    gradient = jnp.asarray(RNG.standard_normal((2, length, 32)), jnp.bfloat16)

    def both() -> Any:
        mixed, transpose = jax.vjp(lambda qkv: self_attention(qkv, 2, causal), qkv)
        return mixed, transpose(gradient)[0]

    expected = both()
    on("NVIDIA H100", "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    for actual, near in zip(both(), expected, strict=True):
        np.testing.assert_allclose(np.float32(actual), np.float32(near), atol=0.05)
    assert calls == [(2, 6, 2, 16)]


@pytest.mark.parametrize(("length", "causal"), [(197, False), (256, False), (77, True)])
def test_it_is_lowered_for_cuda(length: int, causal: bool, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on("NVIDIA H100", "gpu")
    # The version of the cuDNN that is not here.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)

    def both(qkv: jax.Array, gradient: jax.Array) -> Any:
        mixed, transpose = jax.vjp(lambda qkv: self_attention(qkv, 12, causal), qkv)
        return mixed, transpose(gradient)

    shapes = (jax.ShapeDtypeStruct((8, length, *end), jnp.bfloat16) for end in ((3, 768), (768,)))
    calls = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    safe = [jax.export.DisabledSafetyCheck.custom_call(call) for call in calls]
    text = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=safe)(*shapes).mlir_module()
    assert all(f"@{call}(" in text for call in calls)
