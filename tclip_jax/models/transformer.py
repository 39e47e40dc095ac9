"""The pre-norm transformer that both towers share, its blocks scanned over a leading layer axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.layers import Dense, attend, gelu, layer_norm
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.parallel.mesh import constrain_batch


class Attention(nn.Module):
    """Multi-head self-attention with one fused q, k, v projection."""

    heads: int
    layers: int
    causal: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        batch, length, width = x_BTD.shape
        std = width**-0.5
        init, out_init = nn.initializers.normal(std), nn.initializers.normal(std * (2 * self.layers) ** -0.5)
        qkv = Dense(3 * width, self.rules, kernel_init=init, dtype=self.dtype, parts=3, name="qkv")
        qkv_BT3D = constrain_batch(qkv(x_BTD), None, None, "tensor")
        q_BTHK, k_BTHK, v_BTHK = (
            qkv_BT3D[:, :, i].reshape(batch, length, self.heads, width // self.heads) for i in range(3)
        )
        mixed_BTHK = constrain_batch(attend(q_BTHK, k_BTHK, v_BTHK, self.causal), None, "tensor")
        out = Dense(width, self.rules, kernel_init=out_init, dtype=self.dtype, name="out")
        return out(mixed_BTHK.reshape(batch, length, width))


class MLP(nn.Module):
    """Two dense layers with the activation between them."""

    hidden: int
    layers: int
    quick_gelu: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        width = x_BTD.shape[-1]
        init = nn.initializers.normal((2 * width) ** -0.5)
        out_init = nn.initializers.normal(width**-0.5 * (2 * self.layers) ** -0.5)
        x_BTF = Dense(self.hidden, self.rules, kernel_init=init, dtype=self.dtype, name="fc1")(x_BTD)
        x_BTF = constrain_batch(gelu(x_BTF, self.quick_gelu), None, "tensor")
        return Dense(width, self.rules, kernel_init=out_init, dtype=self.dtype, name="fc2")(x_BTF)


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)); a scan's body, so it returns (carry, no output)."""

    heads: int
    layers: int
    mlp_ratio: float
    layer_scale: float | None
    causal: bool
    quick_gelu: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        width = x_BTD.shape[-1]
        attention = Attention(self.heads, self.layers, self.causal, self.rules, self.dtype, name="attention")
        hidden = int(width * self.mlp_ratio)
        mlp = MLP(hidden, self.layers, self.quick_gelu, self.rules, self.dtype, name="mlp")
        x_BTD = x_BTD + self._scaled("ls_1", attention(layer_norm("ln_1")(x_BTD)))
        x_BTD = x_BTD + self._scaled("ls_2", mlp(layer_norm("ln_2")(x_BTD)))
        return constrain_batch(x_BTD), None

    def _scaled(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """LayerScale's per-channel gain, where the model has one."""
        if self.layer_scale is None:
            return x_BTD
        gain_D = self.param(name, nn.initializers.constant(self.layer_scale), (x_BTD.shape[-1],))
        return (x_BTD.astype(jnp.float32) * gain_D).astype(self.dtype)


def scan_blocks(
    x_BTD: jax.Array,
    *,
    layers: int,
    heads: int,
    mlp_ratio: float,
    layer_scale: float | None,
    causal: bool,
    quick_gelu: bool,
    rules: TernaryRules,
    dtype: jax.typing.DTypeLike,
    remat: bool,
) -> jax.Array:
    """Runs `layers` blocks as one scan inside a tower: compiled once, parameters `blocks/…` stacked on a layer axis."""
    body = nn.remat(Block, prevent_cse=False) if remat else Block
    # tclip_jax.numerics records activations in "taps" and replaces them from "reference"; both are empty otherwise.
    scanned = nn.scan(
        body, variable_axes={"params": 0, "taps": 0, "reference": 0}, split_rngs={"params": True}, length=layers
    )
    # The name keeps the wrappers' own (ScanCheckpointBlock_0) out of the parameter paths.
    blocks = scanned(heads, layers, mlp_ratio, layer_scale, causal, quick_gelu, rules, dtype, name="blocks")
    return blocks(constrain_batch(x_BTD), None)[0]
