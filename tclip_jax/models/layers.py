"""Layers whose weight is float, fake-quantized, a blend of both, or packed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.config import Activation, CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.parallel.mesh import BATCH_AXES, constrain, mesh_in_force
from tclip_jax.parallel.sharding import matrix_specs, path_of
from tclip_jax.ternary import (
    PackedTensor,
    QuantizedTensor,
    Quantizer,
    TernaryTensor,
    UniformTensor,
    dead_zone_bias,
    fake_quantize,
    gather_rows,
    soft_quantize,
    ternary_matmul,
)
from tclip_jax.ternary.gathering import LEVELS, Placement, gather_float, look_up
from tclip_jax.ternary.int8 import Int8Matrix, int8_product
from tclip_jax.ternary.sums import dense_product


class Softness(NamedTuple):
    """How far weights are from ternary: w_eff = λ · ŵ + (1 − λ) · w, where ŵ is soft with a temperature above 0.

    For λ = 1 and τ = 0, w_eff equals the hard ŵ to the bit.

    Attributes:
      quant_lambda: the quantization blend λ, float32, a scalar or one value per layer.
      temperature: τ of `soft_quantize`, in the shape of λ; None for 0.
    """

    quant_lambda: jax.Array
    temperature: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "softness"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Blend:
    """A leaf of a parameter tree that is not used as ternary, or not yet.

    Attributes:
      weight: the latent weight w; stacked layers are on its first axis.
      softness: how the weight is used.
    """

    weight: jax.Array
    softness: Softness


def blend_params(params: Any, rules: TernaryRules, softness: Softness) -> Any:
    """Replace every latent weight that `rules` select with a `Blend`.

    Args:
      params: a parameter tree with latent weights.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      softness: λ and τ, scalars.

    Returns:
      The new tree.
    """

    def blend(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
        path = path_of(key_path)
        if path not in TERNARIZABLE or find_quantizer(path, rules) is None:
            return leaf
        each = softness
        if "/blocks/" in path:
            each = jax.tree.map(lambda value: jnp.broadcast_to(value, (len(leaf),)), softness)
        return Blend(leaf, each)

    return jax.tree_util.tree_map_with_path(blend, params)


Initializer = nn.initializers.Initializer
# The collection of Flax's `rngs` for quantizers that draw random numbers.
QUANTIZER_RNG = "quantizer"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "alpha", "softness", "key"),
    meta_fields=("size", "quantizer", "axis", "placement"),
)
@dataclasses.dataclass(frozen=True)
class Latent:
    """A float weight as a matrix, or some rows of a matrix, and everything that quantizes it.

    Attributes:
      weight: floats (K, N); (V, W) for an embedding table.
      size: number of weights of the whole matrix.
      quantizer: None if the weight stays float.
      axis: the input axis, −2 or −1.
      alpha: the learned scale of the kinds that have one, or None.
      softness: how far the weight is from ternary; None for hard trits.
      placement: shardings of the matrix; None if it is not sharded.
      key: PRNG key of a quantizer that draws random numbers; None makes it deterministic.
    """

    weight: jax.Array
    size: int
    quantizer: Quantizer | None = None
    axis: int = -2
    alpha: jax.Array | None = None
    softness: Softness | None = None
    placement: Placement | None = None
    key: jax.Array | None = None

    def rows(self, index: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Look up rows of a table, quantized, in `dtype`.

        Only these rows are quantized, unless the table is sharded, has one scale, or is quantized with noise, which is
        the same for each use of a row.
        """
        whole = self.quantizer is not None and (self.quantizer.group == "tensor" or self.key is not None)
        plain = self.quantizer is None or self.quantizer.rule.gradient is None
        if self.placement and plain and not whole and self.softness is None:
            return look_up(self.weight, index, self.quantizer, self.placement, jnp.dtype(dtype))
        if self.placement or whole:
            return self.quantized(jnp.float32)[index].astype(dtype)
        alpha = None if self.alpha is None else self.alpha[index]
        return dataclasses.replace(self, weight=self.weight[index], alpha=alpha).quantized(dtype).astype(dtype)

    def quantized(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the float32 matrix that a product uses, gathered for the computation.

        Float weights that move between devices are rounded to `dtype`. The gradient is float32, also where it is summed
        over devices.
        """
        weight = self.weight
        if self.quantizer is not None:
            quantize = functools.partial(
                fake_quantize, self.weight, self.quantizer, self.axis, self.alpha, self.size, key=self.key
            )
            if self.softness is None:
                return quantize(dtype=jnp.float32, placement=self.placement)
            quant_lambda, temperature = self.softness
            if temperature is not None and not self.quantizer.uniform:
                quantize = functools.partial(
                    soft_quantize, self.weight, self.quantizer, temperature, self.axis, self.key
                )
            weight = quant_lambda * quantize() + (1 - quant_lambda) * self.weight
        return gather_float(weight, self.placement, jnp.dtype(dtype)) if self.placement else weight

    def added_bias(self) -> jax.Array | None:
        """Return the bias (N,) that dead-zone weights add to the layer's; None if the quantizer has none."""
        if self.quantizer is None or not self.quantizer.dead_zone_bias:
            return None
        bias = dead_zone_bias(self.weight, self.quantizer, self.axis, self.alpha)
        return bias if self.softness is None else self.softness.quant_lambda * bias


def find_weight(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], rules: TernaryRules
) -> PackedTensor | QuantizedTensor | Int8Matrix | Latent:
    """Read the parameter `name` of a module as a matrix, and create it during initialisation.

    Args:
      module: the module, in its own scope.
      name: name of the parameter. A learned scale is the parameter `name`_scale.
      init: initializer of the parameter.
      shape: shape of the parameter; see `matrix_shape` for that of the matrix.
      rules: (regex, quantizer) pairs that select the ternary parameters.

    Returns:
      The packed, quantized or int8 weight of the parameter tree, otherwise a `Latent`.
    """
    stored: Any = module.get_variable("params", name)
    if isinstance(stored, PackedTensor | QuantizedTensor):
        return stored
    if isinstance(stored, Int8Matrix):
        specs = matrix_specs("/".join((*module.path, name)), stored.int8.shape)
        return dataclasses.replace(stored, int8=Placement(*specs).place(stored.int8)) if specs else stored
    value: Any = module.param(name, init, shape)
    softness = value.softness if isinstance(value, Blend) else None
    value = value.weight if isinstance(value, Blend) else value
    path = "/".join((*module.path, name))
    weight, quantizer, axis = value.reshape(matrix_shape(shape)), find_quantizer(path, rules), input_axis(path)
    alpha = module.get_variable("params", f"{name}_scale") if quantizer and quantizer.learned else None
    specs = matrix_specs(path, weight.shape)
    placement, key = specs and Placement(*specs, BATCH_AXES), None
    if quantizer and quantizer.rule.random and module.has_rng(QUANTIZER_RNG):
        key = module.make_rng(QUANTIZER_RNG)
    return Latent(weight, weight.size, quantizer, axis, alpha, softness, placement, key)


def find_bias(
    module: nn.Module, features: int, weight: PackedTensor | QuantizedTensor | Int8Matrix | Latent
) -> jax.Array:
    """Read the parameter `bias` (N,) of a layer, with what dead-zone weights add to it, and create it at first.

    Args:
      module: the layer, in its own scope.
      features: N.
      weight: the weight of the layer, from `find_weight`.
    """
    bias: jax.Array = module.param("bias", nn.initializers.zeros, (features,))
    added = weight.added_bias() if isinstance(weight, Latent) else None
    return bias if added is None else bias + added


def multiply(
    x: jax.Array,
    weight: PackedTensor | QuantizedTensor | Int8Matrix | Latent,
    parts: int = 1,
    gradient_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Multiply activations by a weight: x · W. A uniform weight is dequantized in each call.

    Args:
      x: floats (..., K).
      weight: (K, N).
      parts: number of equal matrices that W holds side by side.
      gradient_dtype: dtype in which devices add their sums of the gradient of a latent W, see `dense_product`.

    Returns:
      (..., N) in the dtype of `x`; (..., parts, N / parts) if devices along the mesh axis `tensor` share each part.
    """
    if isinstance(weight, PackedTensor | TernaryTensor):
        return ternary_matmul(x, weight)
    if isinstance(weight, Int8Matrix):
        return int8_product(x, jax.tree.map(lambda leaf: _split_parts(leaf, parts), weight))
    if isinstance(weight, QuantizedTensor):
        return dense_product(x, weight.dequantize())
    product = functools.partial(_multiply_latent, parts=parts, gradient_dtype=gradient_dtype)
    if weight.quantizer is None:
        return product(x, weight)
    # Quantized weights saved for the backward pass would be as large as the latent weights. Scales and packed trits are
    # small, and it is faster to expand them again than to write and read quantized weights.
    policy = jax.checkpoint_policies.save_only_these_names(LEVELS)
    return jax.checkpoint(product, prevent_cse=False, policy=policy)(x, weight)


def _multiply_latent(x: jax.Array, weight: Latent, parts: int, gradient_dtype: jax.typing.DTypeLike) -> jax.Array:
    return dense_product(x, _split_parts(weight.quantized(x.dtype), parts), gradient_dtype)


def _split_parts(w_KN: jax.Array, parts: int) -> jax.Array:
    """Reshape to (K, parts, N / parts) if devices along the mesh axis `tensor` share each part."""
    mesh = mesh_in_force()
    if parts == 1 or mesh is None or mesh.shape["tensor"] == 1:
        return w_KN
    return constrain(w_KN.reshape(len(w_KN), parts, -1), None, None, "tensor")


class Dense(nn.Module):
    """A dense layer x · W + b with a float or ternary W (K, N).

    Attributes:
      features: N, the number of outputs.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      use_bias: whether the layer adds b.
      kernel_init: initializer of W.
      dtype: dtype of the computation and of the result.
      parts: number of equal matrices that W holds side by side. With several, the result is (..., parts, N / parts),
        and devices along the mesh axis `tensor` share each part.
      gradient_dtype: dtype in which devices add their sums of the gradient of W.
    """

    features: int
    rules: TernaryRules = ()
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: jax.typing.DTypeLike = jnp.float32
    parts: int = 1
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = find_weight(self, "kernel", self.kernel_init, shape, self.rules)
        y = multiply(x.astype(self.dtype), kernel, self.parts, self.gradient_dtype)
        if self.use_bias:
            bias = find_bias(self, self.features, kernel)
            # In float32, because the gradient of the bias is a sum over all tokens in this dtype.
            y = (y.astype(jnp.float32) + bias.reshape(y.shape[x.ndim - 1 :])).astype(self.dtype)
        # After the sum, which XLA would otherwise store and reshape in float32.
        return y if self.parts == 1 else y.reshape(*x.shape[:-1], self.parts, -1)


class Identity(nn.Module):
    """A layer without parameters that returns its input, in place of a projection that a tower does not have."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Embedding(nn.Module):
    """An embedding layer: selects rows of a float or ternary table (V, W) by int32 tokens.

    Attributes:
      entries: V, the size of the vocabulary.
      features: W, the width.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the result.
    """

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
            # If all rows share their scales, those have one row; "clip" maps every token to it.
            rows = TernaryTensor(
                table.trits[tokens], jnp.take(table.scale, tokens, axis=0, mode="clip"), table.group, table.axis
            )
            return rows.dequantize(self.dtype)
        if isinstance(table, UniformTensor):
            return table.rows(tokens).dequantize(self.dtype)
        assert isinstance(table, Latent)  # tables are not int8
        return table.rows(tokens, self.dtype)


def layer_norm(name: str, epsilon: float) -> nn.LayerNorm:
    """A LayerNorm in float32. Flax's fast variance E[x²] − E[x]² would lose precision."""
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=jnp.float32, name=name)


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """GELU by the error function, its approximation with a hyperbolic tangent, or OpenAI's x · sigmoid(1.702 x)."""
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


def normalize_embedding(x: jax.Array) -> jax.Array:
    """L2-normalise rows in float32. A zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def check_tensor(config: CLIPConfig, rules: TernaryRules, tensor: int) -> None:
    """Check that `tensor` devices can share both towers: whole heads, hidden units and groups of ternary weights.

    Raises:
      ValueError: a number is not divisible; the message has the tower or the parameter, and both numbers.
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
