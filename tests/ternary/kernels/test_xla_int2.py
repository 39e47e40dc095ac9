"""XLA's int2 product against NumPy float64, and that it is never used on v4."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.ternary.kernels import xla_int2
from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.tensor import TernaryTensor


@pytest.mark.parametrize("activations", ["A32", "A16", "A8"])
@pytest.mark.parametrize("group", [100, 256, 300])
def test_equals_float64(group: int, activations: Any) -> None:
    draw = np.random.default_rng(0)
    trits = draw.integers(-1, 2, (300, 40), np.int8)
    scale = (draw.integers(128, 256, (-(-300 // group), 40)) / 4096).astype(np.float32)
    w = TernaryTensor(jnp.asarray(trits), jnp.asarray(scale), group)
    packed = xla_int2.pack(w)
    assert packed.data.dtype == jnp.int2
    np.testing.assert_array_equal(xla_int2.unpack(packed), w.dequantize())
    x = jax.random.normal(jax.random.key(0), (5, 300))
    exact = np.asarray(x.astype(jnp.bfloat16) if activations == "A16" else x, np.float64)
    if activations == "A8":
        rounded, level = quantize_activations(x)
        exact = np.asarray(rounded, np.float64) * np.asarray(level, np.float64)
    expected = exact @ (trits * scale.astype(np.float64)[np.arange(300) // group])
    result = xla_int2.matmul(x, packed, activations=activations)
    assert np.abs(np.asarray(result, np.float64) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3", "TPU v4", "TPU v4 lite", "cpu", "NVIDIA H100"])
def test_never_on_v4_or_what_is_not_known(kind: str) -> None:
    assert f"not on {kind}" in str(xla_int2.unsupported(device_kind=kind))


@pytest.mark.parametrize("kind", xla_int2.DEVICE_KINDS)
def test_supported(kind: str) -> None:
    assert xla_int2.unsupported(device_kind=kind) is None
