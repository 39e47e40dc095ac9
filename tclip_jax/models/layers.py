"""Layers whose weight is float, ternary in training (fake-quantized), or ternary in fact."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.ternary_rules import TernaryRules, find_quantizer, input_axis
from tclip_jax.ternary import Quantizer, TernaryTensor, fake_quantize, ternary_matmul

Initializer = nn.initializers.Initializer


def _weight(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], rules: TernaryRules
) -> tuple[Any, Quantizer | None, int]:
    """The parameter, its quantizer if it is a latent weight, and its input axis."""
    value = module.param(name, init, shape)
    path = "/".join((*module.path, name))
    quantizer = None if isinstance(value, TernaryTensor) else find_quantizer(path, rules)
    return value, quantizer, input_axis(path)


class Dense(nn.Module):
    """x · W + b with a float or ternary W (K, N)."""

    features: int
    rules: TernaryRules = ()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel, quantizer, axis = _weight(self, "kernel", self.kernel_init, shape, self.rules)
        x = x.astype(self.dtype)
        if isinstance(kernel, TernaryTensor):
            y = ternary_matmul(x, kernel)
        else:
            y = x @ (fake_quantize(kernel, quantizer, axis) if quantizer else kernel).astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """Rows of a float or ternary table (V, W); only the gathered rows are quantized."""

    entries: int
    features: int
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (self.entries, self.features)
        table, quantizer, axis = _weight(self, "embedding", nn.initializers.normal(0.02), shape, self.rules)
        if isinstance(table, TernaryTensor):
            # Scales that all rows share have one row, which clamping finds for every token.
            rows = TernaryTensor(
                table.trits[tokens], jnp.take(table.scale, tokens, axis=0, mode="clip"), table.group, axis
            )
            return rows.dequantize(self.dtype)
        if quantizer and quantizer.group == "tensor":
            return fake_quantize(table, quantizer, axis)[tokens].astype(self.dtype)
        rows = table[tokens]
        return (fake_quantize(rows, quantizer, axis) if quantizer else rows).astype(self.dtype)


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm in float32 with torch's epsilon; Flax's fast variance E[x²] − E[x]² would lose precision."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, name=name)


def gelu(x: jax.Array, quick: bool) -> jax.Array:
    """GELU by the error function as in torch, or OpenAI's x · sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x) if quick else jax.nn.gelu(x, approximate=False)


def normalize_embedding(x: jax.Array) -> jax.Array:
    """Rows of length 1 in float32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
