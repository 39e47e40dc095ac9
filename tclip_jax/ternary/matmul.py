"""The product of activations with a ternary weight."""

from __future__ import annotations

import jax

from tclip_jax.ternary.tensor import TernaryTensor


def ternary_matmul(x: jax.Array, w: TernaryTensor) -> jax.Array:
    """x · ŵ in the dtype of `x`: (..., K) with a (K, N) ternary weight gives (..., N).

    Dequantizes and multiplies: the reference that every faster implementation is compared with, and bit-equal to the
    fake-quantized product of training.
    """
    return x @ w.dequantize(x.dtype)
