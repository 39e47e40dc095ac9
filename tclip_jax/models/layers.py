"""Layers whose weight is float, ternary in training (fake-quantized), or ternary in fact."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.blending import Blend
from tclip_jax.models.ternary_rules import TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.ternary import PackedTensor, Quantizer, TernaryTensor, fake_quantize, gather_rows, ternary_matmul

Initializer = nn.initializers.Initializer


class Latent(NamedTuple):
    """A float weight as a matrix, or rows of one, and all that quantizes it; no quantizer: it stays float.

    Attributes:
      size: number of weights of the whole matrix.
      alpha: the learned scale, of the kinds of quantizers that have one.
      share: of the quantized weight where it is blended with the float one.
    """

    weight: jax.Array
    size: int
    quantizer: Quantizer | None = None
    axis: int = -2
    alpha: jax.Array | None = None
    share: jax.Array | None = None

    def rows(self, index: jax.Array) -> Latent:
        """The rows of a table; α too has a row for each."""
        alpha = None if self.alpha is None else self.alpha[index]
        return self._replace(weight=self.weight[index], alpha=alpha)

    def quantized(self) -> jax.Array:
        if self.quantizer is None:
            return self.weight
        quantized = fake_quantize(self.weight, self.quantizer, self.axis, self.alpha, self.size)
        return quantized if self.share is None else self.share * quantized + (1 - self.share) * self.weight


def find_weight(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], rules: TernaryRules
) -> PackedTensor | TernaryTensor | Latent:
    """The parameter `name` of a module as a matrix, with the parameter `name`_scale where its scale is learned."""
    stored: Any = module.get_variable("params", name)
    if isinstance(stored, PackedTensor | TernaryTensor):
        return stored
    value: Any = module.param(name, init, shape)
    share = value.share if isinstance(value, Blend) else None
    value = value.weight if isinstance(value, Blend) else value
    path = "/".join((*module.path, name))
    weight, quantizer, axis = value.reshape(matrix_shape(shape)), find_quantizer(path, rules), input_axis(path)
    alpha = module.get_variable("params", f"{name}_scale") if quantizer and quantizer.learned else None
    return Latent(weight, weight.size, quantizer, axis, alpha, share)


def multiply(x: jax.Array, weight: PackedTensor | TernaryTensor | Latent) -> jax.Array:
    """x · W in the dtype of `x`."""
    if isinstance(weight, PackedTensor | TernaryTensor):
        return ternary_matmul(x, weight)
    return x @ weight.quantized().astype(x.dtype)


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
        y = multiply(x.astype(self.dtype), find_weight(self, "kernel", self.kernel_init, shape, self.rules))
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
        table = find_weight(self, "embedding", nn.initializers.normal(0.02), shape, self.rules)
        if isinstance(table, PackedTensor):
            return gather_rows(table, tokens, self.dtype)
        if isinstance(table, TernaryTensor):
            # Scales that all rows share have one row, which clamping finds for every token.
            rows = TernaryTensor(
                table.trits[tokens], jnp.take(table.scale, tokens, axis=0, mode="clip"), table.group, table.axis
            )
            return rows.dequantize(self.dtype)
        if table.quantizer and table.quantizer.group == "tensor":
            return table.quantized()[tokens].astype(self.dtype)
        return table.rows(tokens).quantized().astype(self.dtype)


def layer_norm(name: str) -> nn.LayerNorm:
    """LayerNorm in float32 with torch's epsilon; Flax's fast variance E[x²] − E[x]² would lose precision."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, name=name)


def gelu(x: jax.Array, quick: bool) -> jax.Array:
    """GELU by the error function as in torch, or OpenAI's x · sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x) if quick else jax.nn.gelu(x, approximate=False)


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, causal: bool) -> jax.Array:
    """softmax(q · kᵀ / √K) · v of each head (B, T, H, K), the softmax in float32; causal: no token sees a later one.

    What jax.nn.dot_product_attention computes. Moving heads before tokens first is twice as fast in XLA on CPUs.
    """
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(0, 2, 1, 3) for x in (q_BTHK, k_BTHK, v_BTHK))
    logits_BHTS = jnp.einsum("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, preferred_element_type=jnp.float32)
    logits_BHTS *= q_BTHK.shape[-1] ** -0.5
    if causal:
        logits_BHTS = jnp.where(jnp.tri(logits_BHTS.shape[-1], dtype=bool), logits_BHTS, -jnp.inf)
    weights_BHTS = jax.nn.softmax(logits_BHTS, axis=-1).astype(v_BTHK.dtype)
    return jnp.einsum("BHTS,BHSK->BHTK", weights_BHTS, v_BHSK).transpose(0, 2, 1, 3)


def normalize_embedding(x: jax.Array) -> jax.Array:
    """Rows of length 1 in float32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
