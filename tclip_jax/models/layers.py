"""Layers whose weight is float, ternary in training (fake-quantized), a blend of both, or packed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.parallel.mesh import constrain, mesh_in_force
from tclip_jax.parallel.sharding import matrix_specs, path_of
from tclip_jax.ternary import PackedTensor, Quantizer, TernaryTensor, fake_quantize, gather_rows, ternary_matmul
from tclip_jax.ternary.gathering import LEVELS, Placement, gather_float, look_up
from tclip_jax.ternary.sums import dense_product


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "share"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Blend:
    """Stands in a parameter tree for a latent weight that is computed with as share · ŵ + (1 − share) · w.

    At a share of 1 that is ŵ to the bit.

    Attributes:
      weight: the latent weight, stacked layers on its first axis.
      share: float32, a scalar, or one for each layer.
    """

    weight: jax.Array
    share: jax.Array


def blend_params(params: Any, rules: TernaryRules, share: jax.Array) -> Any:
    """The tree with a `Blend` in place of every latent weight that `rules` name; `share` is a scalar from 0 to 1."""

    def blend(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
        path = path_of(key_path)
        if path not in TERNARIZABLE or find_quantizer(path, rules) is None:
            return leaf
        return Blend(leaf, jnp.broadcast_to(share, (len(leaf),)) if "/blocks/" in path else share)

    return jax.tree_util.tree_map_with_path(blend, params)


Initializer = nn.initializers.Initializer


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "alpha", "share"),
    meta_fields=("size", "quantizer", "axis", "placement"),
)
@dataclasses.dataclass(frozen=True)
class Latent:
    """A float weight as a matrix, or rows of one, and all that quantizes it; no quantizer: it stays float.

    Attributes:
      size: number of weights of the whole matrix.
      alpha: the learned scale, of the kinds of quantizers that have one.
      share: of the quantized weight where it is blended with the float one.
      placement: where it is stored and where it is used, of a sharded matrix.
    """

    weight: jax.Array
    size: int
    quantizer: Quantizer | None = None
    axis: int = -2
    alpha: jax.Array | None = None
    share: jax.Array | None = None
    placement: Placement | None = None

    def rows(self, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of a table, quantized, in `dtype`; only those are quantized where nothing is sharded."""
        whole = self.quantizer is not None and self.quantizer.group == "tensor"
        if self.placement and not (whole or self.alpha is not None or self.share is not None):
            return look_up(self.weight, index, self.quantizer, self.placement, jnp.dtype(dtype))
        if self.placement or whole:
            return self.quantized(jnp.float32)[index].astype(dtype)
        alpha = None if self.alpha is None else self.alpha[index]
        return dataclasses.replace(self, weight=self.weight[index], alpha=alpha).quantized(dtype).astype(dtype)

    def quantized(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """What a product multiplies by, where it is used: float32, which floats that move lose on the way in `dtype`.

        So its gradient is float32 too, and is summed over devices in that.
        """
        if self.quantizer is None:
            weight = self.weight
        elif self.share is None:
            given = (self.weight, self.quantizer, self.axis, self.alpha, self.size)
            return fake_quantize(*given, jnp.float32, self.placement)
        else:
            quantized = fake_quantize(self.weight, self.quantizer, self.axis, self.alpha, self.size)
            weight = self.share * quantized + (1 - self.share) * self.weight
        return gather_float(weight, self.placement, jnp.dtype(dtype)) if self.placement else weight


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
    specs = matrix_specs(path, weight.shape)
    return Latent(weight, weight.size, quantizer, axis, alpha, share, specs and Placement(*specs))


def multiply(x: jax.Array, weight: PackedTensor | TernaryTensor | Latent, parts: int = 1) -> jax.Array:
    """x · W in the dtype of `x`; with more `parts` than one, they have an axis before the last."""
    if isinstance(weight, PackedTensor | TernaryTensor):
        y = ternary_matmul(x, weight)
        return y if parts == 1 else y.reshape(*y.shape[:-1], parts, -1)
    product = functools.partial(_multiply_latent, parts=parts)
    if weight.quantizer is None:
        return product(x, weight)
    # Quantized weights of every layer, kept for the backward pass, are as large as the latent ones. Levels and packed
    # trits are not, and to expand them again takes less time than to write and read the weights.
    policy = jax.checkpoint_policies.save_only_these_names(LEVELS)
    return jax.checkpoint(product, prevent_cse=False, policy=policy)(x, weight)


def _multiply_latent(x: jax.Array, weight: Latent, parts: int) -> jax.Array:
    w_KN = weight.quantized(x.dtype)
    mesh = mesh_in_force()
    if parts > 1 and mesh is not None and mesh.shape["tensor"] > 1:
        return dense_product(x, constrain(w_KN.reshape(len(w_KN), parts, -1), None, None, "tensor"))
    y = dense_product(x, w_KN)
    return y if parts == 1 else y.reshape(*y.shape[:-1], parts, -1)


class Dense(nn.Module):
    """x · W + b with a float or ternary W (K, N).

    With `parts` > 1, W is as many matrices beside each other, and what they give is (..., parts, N / parts): devices
    along the mesh axis `tensor` share each.
    """

    features: int
    rules: TernaryRules = ()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jax.typing.DTypeLike = jnp.float32
    parts: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = find_weight(self, "kernel", self.kernel_init, shape, self.rules)
        y = multiply(x.astype(self.dtype), kernel, self.parts)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            # In float32, as wherever a parameter meets all tokens: its gradient is a sum over them in this dtype.
            y = (y.astype(jnp.float32) + bias.reshape(y.shape[x.ndim - 1 :])).astype(self.dtype)
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
        return table.rows(tokens, self.dtype)


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


def check_tensor(config: CLIPConfig, rules: TernaryRules, tensor: int) -> None:
    """Checks that `tensor` devices share whole heads, and inputs in whole groups of weights that share a scale.

    Raises:
      ValueError: where they do not, naming the tower or the parameter, and both numbers.
    """
    if tensor == 1:
        return
    for tower, shape in (("image", config.vision), ("text", config.text)):
        hidden = int(shape.width * shape.mlp_ratio)
        for what, count in ((f"{shape.heads} heads", shape.heads), (f"{hidden} hidden units", hidden)):
            if count % tensor:
                raise ValueError(f"mesh tensor={tensor} does not divide the {what} of the {tower} tower")
        for name, inputs in (("attention/out", shape.width), ("mlp/fc2", hidden)):
            path = f"{tower}/blocks/{name}/kernel"
            quantizer = find_quantizer(path, rules)
            if quantizer is None:
                continue
            group = inputs if isinstance(quantizer.group, str) else min(quantizer.group, inputs)
            if inputs // tensor % group:
                raise ValueError(
                    f"{path}: {inputs} inputs over mesh tensor={tensor} are {inputs // tensor} on a device, "
                    f"not a multiple of its quantizer's group {group}"
                )
