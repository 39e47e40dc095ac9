"""The choice of an implementation from shapes and the kind of device."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.ternary import Quantizer, TernaryTensor, choose, matmul, repack, ternarize, ternary_matmul
from tclip_jax.ternary.kernels import NAMES, PREFERRED, kernel, native_cpu, reference
from tclip_jax.ternary.tensor import traced_device


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear logged choices and the environment variable, and pretend that the native library is built."""
    matmul._log.cache_clear()
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("portable",))


@pytest.fixture
def weight() -> TernaryTensor:
    return TernaryTensor(np.ones((64, 32), np.int8), np.ones((2, 32), np.float32), 32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "native_cpu"),
        ({"activations": "A8", "rows": 1}, "native_cpu"),
        ({"dtype": np.float16, "activations": "A8"}, "xla_int8"),
        ({"dtype": np.float16, "activations": "A8", "rows": 1}, "reference"),
        ({"dtype": np.float16}, "reference"),
    ],
)
def test_cpus(arguments: dict[str, Any], name: str) -> None:
    assert choose((768, 3072), 256, **arguments) == name


def test_without_the_library_xla_serves_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_cpu, "instruction_sets", tuple)
    with caplog.at_level(logging.INFO, "tclip_jax"):
        assert [choose((768, 3072), 256, activations=each) for each in ("A8", "A32")] == ["xla_int8", "reference"]  # type: ignore[arg-type]
    assert "xla_int8 (not native_cpu: the native library was not built" in caplog.messages[0]
    assert "not xla_int8: its dot takes int8 activations" in caplog.messages[1]


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tclip_jax"):
        for rows in (8, 8, 16):
            choose((768, 3072), 256, rows=rows)
    assert caplog.messages == ["ternary product (cpu, A32 float32): native_cpu (the first choice on this platform)"]


def test_16_bits_are_bfloat16_where_there_are_no_products_of_int16(monkeypatch: pytest.MonkeyPatch) -> None:
    w = ternarize(jax.random.normal(jax.random.key(0), (64, 8)), Quantizer(group=32))
    x = jax.random.normal(jax.random.key(1), (5, 64))
    monkeypatch.setattr(reference, "traced_device", lambda: ("some accelerator", "cuneiform"))
    result = ternary_matmul(x, w, activations="A16")
    narrow = np.asarray(x.astype(jnp.bfloat16), np.float64)
    # float32 weights are exact in bfloat16: their scales have 8 significant bits.
    np.testing.assert_allclose(result, narrow @ np.asarray(w.dequantize(), np.float64), rtol=1e-5, atol=1e-6)


def test_another_platform_is_served_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "traced_device", lambda: ("some accelerator", "cuneiform"))
    assert choose((768, 3072), 256) == "reference"


def test_the_device_is_that_of_the_default_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_), kinds = jax.devices("cpu"), jax.devices
    monkeypatch.setattr(jax, "devices", lambda platform=None: kinds(platform)[:1])
    for default in (None, "cpu", first):
        with jax.default_device(default):
            assert traced_device() == (first.device_kind, "cpu")


@pytest.mark.parametrize(
    ("kind", "platform", "arguments", "name"),
    [
        ("TPU v4", "tpu", {}, "mosaic_tpu"),
        ("TPU v4", "tpu", {"activations": "A8"}, "mosaic_tpu"),
        ("TPU v5 lite", "tpu", {"activations": "A8"}, "mosaic_tpu_int8"),
        ("TPU v6 lite", "tpu", {}, "mosaic_tpu"),
        ("TPU v6 lite", "tpu", {"dtype": np.float16}, "xla_int2"),
        ("TPU v3", "tpu", {}, "reference"),
        ("NVIDIA H100 80GB HBM3", "gpu", {}, "reference"),
    ],
)
def test_accelerators(
    kind: str, platform: str, arguments: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "traced_device", lambda: (kind, platform))
    assert choose((768, 3072), 256, **{"dtype": jnp.bfloat16} | arguments) == name


def test_what_is_forced_serves_or_says_why_not(weight: TernaryTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repack(weight, implementation="xla_int8").layout == "xla_int8"
    monkeypatch.setenv(matmul.VARIABLE, "reference")
    assert repack(weight).layout == "reference"
    assert repack(weight, implementation="xla_int8").layout == "xla_int8"
    message = r"^implementation 'xla_int2' cannot serve cpu, A8 float32, M=3 K=64 N=32: XLA packs int2 on TPU v5"
    with pytest.raises(ValueError, match=message):
        ternary_matmul(np.ones((3, 64), np.float32), weight, activations="A8", implementation="xla_int2")
    with pytest.raises(ValueError, match=r"^no implementation 'cuda' of the ternary product: there are reference, "):
        repack(weight, implementation="cuda")


def test_a_packed_weight_is_not_multiplied_by_another(weight: TernaryTensor) -> None:
    packed = repack(weight, implementation="reference")
    with pytest.raises(ValueError, match=r"^the weight is packed for 'reference', not for 'native_cpu': repack it"):
        ternary_matmul(np.ones((3, 64), np.float32), packed, implementation="native_cpu")


def test_a_weight_remembers_what_it_was_packed_for(weight: TernaryTensor) -> None:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    packed = repack(weight, implementation="reference", activations="A8")
    np.testing.assert_array_equal(ternary_matmul(x, packed), ternary_matmul(x, weight, activations="A8"))
    np.testing.assert_array_equal(ternary_matmul(x, packed, activations="A32"), ternary_matmul(x, weight))


def test_implementations_have_their_names() -> None:
    here = [name for name in NAMES if name not in PREFERRED["gpu"][:1]]
    assert [kernel(name).NAME for name in here] == here
