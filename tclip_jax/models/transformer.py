"""The pre-norm transformer of both towers, with its blocks scanned over a leading layer axis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.attention import self_attention
from tclip_jax.models.config import Activation, TextConfig, VisionConfig
from tclip_jax.models.layers import QUANTIZER_RNG, Dense, activate, layer_norm
from tclip_jax.models.native_block import is_native, native_block, with_transforms
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.parallel.mesh import constrain_batch


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection of queries, keys and values.

    Attributes:
      heads: number of heads.
      layers: depth of the tower, which scales the initial output projection.
      causal: whether a token attends only to itself and earlier tokens.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      implementation: see `self_attention`.
      gradient_dtype: dtype in which devices add their sums of the gradients of matrices.
    """

    heads: int
    layers: int
    causal: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike
    implementation: str = "auto"
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        std = width**-0.5
        init, out_init = nn.initializers.normal(std), nn.initializers.normal(std * (2 * self.layers) ** -0.5)
        dense = functools.partial(Dense, rules=self.rules, dtype=self.dtype, gradient_dtype=self.gradient_dtype)
        qkv = dense(3 * width, kernel_init=init, parts=3, name="qkv")
        qkv_BT3D = constrain_batch(qkv(x_BTD), None, None, "tensor")
        mixed_BTD = self_attention(qkv_BT3D, self.heads, self.causal, self.implementation)
        return dense(width, kernel_init=out_init, name="out")(mixed_BTD)


class MLP(nn.Module):
    """Two dense layers with the activation between them.

    Attributes:
      hidden: width between the layers.
      layers: depth of the tower, which scales the initial output layer.
      activation: the activation.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      gradient_dtype: dtype in which devices add their sums of the gradients of matrices.
    """

    hidden: int
    layers: int
    activation: Activation
    rules: TernaryRules
    dtype: jax.typing.DTypeLike
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        dense = functools.partial(Dense, rules=self.rules, dtype=self.dtype, gradient_dtype=self.gradient_dtype)
        init = nn.initializers.normal((2 * width) ** -0.5)
        out_init = nn.initializers.normal(width**-0.5 * (2 * self.layers) ** -0.5)
        x_BTF = dense(self.hidden, kernel_init=init, name="fc1")(x_BTD)
        x_BTF = constrain_batch(activate(x_BTF, self.activation), None, "tensor")
        return dense(width, kernel_init=out_init, name="fc2")(x_BTF)


class Block(nn.Module):
    """A pre-norm block: x + attention(ln_1(x)), then x + mlp(ln_2(x)). As the body of a scan it returns (carry, None).

    Attributes:
      config: the shape of the tower.
      activation: the activation of the MLP.
      causal: whether a token attends only to itself and earlier tokens.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      attention: implementation of the attention, see `self_attention`.
      gradient_dtype: dtype in which devices add their sums of the gradients of matrices.
      native: whether packed weights may run in native calls (`native_block`).
    """

    config: VisionConfig | TextConfig
    activation: Activation
    causal: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike
    attention: str = "auto"
    gradient_dtype: jax.typing.DTypeLike = jnp.float32
    native: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        cfg = self.config
        if self._is_native(x_BTD):
            plain = self.clone(native=False, parent=None)
            native = functools.partial(
                native_block, heads=cfg.heads, causal=self.causal, activation=self.activation, epsilon=cfg.norm_eps
            )
            block = with_transforms(native, lambda params, x: plain.apply({"params": params}, x)[0])
            return block(self.variables["params"], x_BTD), None
        shared = self.rules, self.dtype, self.attention, self.gradient_dtype
        attention = Attention(cfg.heads, cfg.layers, self.causal, *shared, name="attention")
        hidden = int(cfg.width * cfg.mlp_ratio)
        mlp = MLP(hidden, cfg.layers, self.activation, self.rules, self.dtype, self.gradient_dtype, name="mlp")
        x_BTD = x_BTD + self._scaled("ls_1", attention(layer_norm("ln_1", cfg.norm_eps)(x_BTD)))
        x_BTD = x_BTD + self._scaled("ls_2", mlp(layer_norm("ln_2", cfg.norm_eps)(x_BTD)))
        return constrain_batch(x_BTD), None

    def _is_native(self, x_BTD: jax.Array) -> bool:
        """Whether this call is inference in float32 whose activations are not recorded, and the weights fit."""
        recorded = self.is_mutable_collection("taps") or "reference" in self.variables
        if recorded or not self.native or self.config.ls_init_value is not None or x_BTD.dtype != jnp.float32:
            return False
        return is_native(self.variables["params"])

    def _scaled(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """Multiply by LayerScale's gain of each channel, if the model has one."""
        if self.config.ls_init_value is None:
            return x_BTD
        gain_D = self.param(name, nn.initializers.constant(self.config.ls_init_value), (x_BTD.shape[-1],))
        return (x_BTD.astype(jnp.float32) * gain_D).astype(self.dtype)


def scan_blocks(
    x_BTD: jax.Array,
    config: VisionConfig | TextConfig,
    *,
    activation: Activation,
    causal: bool,
    rules: TernaryRules,
    dtype: jax.typing.DTypeLike,
    remat: bool,
    attention: str = "auto",
    gradient_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Apply the blocks of a tower as one scan, which is compiled once.

    Must be called inside a compact module. The parameters `blocks/…` are stacked on a leading layer axis.

    Args:
      x_BTD: the residual stream (B, T, D).
      config: the shape of the tower.
      activation: as in `Block`.
      causal: as in `Block`.
      rules: as in `Block`.
      dtype: as in `Block`.
      remat: whether the backward pass recomputes the activations of each block.
      attention: as in `Block`.
      gradient_dtype: as in `Block`.

    Returns:
      The residual stream after the last block, (B, T, D).
    """
    body = nn.remat(Block, prevent_cse=False) if remat else Block
    # Collections for `tclip_jax.numerics`, which records "taps" and substitutes "reference"; otherwise empty.
    scanned = nn.scan(
        body,
        variable_axes={"params": 0, "taps": 0, "reference": 0},
        split_rngs={"params": True, QUANTIZER_RNG: True},
        length=config.layers,
    )
    # Without a name, that of the wrappers (ScanCheckpointBlock_0) would be in the parameter paths.
    blocks = scanned(config, activation, causal, rules, dtype, attention, gradient_dtype, name="blocks")
    return blocks(constrain_batch(x_BTD), None)[0]
