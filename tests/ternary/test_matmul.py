"""The ternary product against NumPy float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tclip_jax.ternary import Quantizer, TernaryTensor, fake_quantize, ternarize, ternary_matmul


@pytest.mark.parametrize("group", [16, 48, "channel", "tensor"])
def test_equals_float64(group: int | str) -> None:
    x, w = jax.random.normal(jax.random.key(0), (3, 5, 100)), jax.random.normal(jax.random.key(1), (100, 7))
    packed = ternarize(w, Quantizer(2.0, group))  # type: ignore[arg-type]
    scale = np.asarray(packed.scale, np.float64)
    if scale.shape[0] > 1:
        scale = np.repeat(scale, packed.group, axis=0)[:100]
    expected = np.asarray(x, np.float64) @ (np.asarray(packed.trits, np.float64) * scale)
    np.testing.assert_allclose(ternary_matmul(x, packed), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(ternary_matmul(x, packed), x @ fake_quantize(w, Quantizer(2.0, group)))  # type: ignore[arg-type]


def test_is_a_pytree_that_scans_and_differentiates() -> None:
    w = ternarize(jax.random.normal(jax.random.key(1), (3, 8, 8)), Quantizer(2.0, 4))
    x = jax.random.normal(jax.random.key(0), (2, 8))

    def body(x: jax.Array, layer: TernaryTensor) -> tuple[jax.Array, None]:
        return ternary_matmul(x, layer), None

    scanned = jax.jit(lambda x: jax.lax.scan(body, x, w)[0])
    dense = w.dequantize()
    np.testing.assert_allclose(scanned(x), x @ dense[0] @ dense[1] @ dense[2], rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: scanned(x).sum())(x)
    np.testing.assert_allclose(gradient[0], (dense[0] @ dense[1] @ dense[2]).sum(1), rtol=1e-5, atol=1e-5)
