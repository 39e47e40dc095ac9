"""SigLIP's attention pooling, the MAP head of its image tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.attention import attend
from tclip_jax.models.config import Activation, VisionConfig
from tclip_jax.models.layers import Dense, layer_norm
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.models.transformer import MLP


class ProbeAttention(nn.Module):
    """Multi-head attention of one learned query to all tokens: (B, T, D) to (B, 1, D).

    Attributes:
      heads: number of heads.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
    """

    heads: int
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        batch, length, width = x_BTD.shape
        init = nn.initializers.normal(width**-0.5)
        probe_1D = self.param("probe", init, (1, width))
        query = Dense(width, self.rules, kernel_init=init, dtype=self.dtype, name="q")
        keys_values = Dense(2 * width, self.rules, kernel_init=init, dtype=self.dtype, parts=2, name="kv")
        q_1HK = query(probe_1D).reshape(1, self.heads, width // self.heads)
        kv_BT2D = keys_values(x_BTD)
        k_BTHK, v_BTHK = (kv_BT2D[:, :, i].reshape(batch, length, *q_1HK.shape[1:]) for i in range(2))
        with jax.named_scope("attend"):
            mixed_B1HK = attend(jnp.broadcast_to(q_1HK, (batch, *q_1HK.shape)), k_BTHK, v_BTHK, causal=False)
        out = Dense(width, self.rules, kernel_init=init, dtype=self.dtype, name="out")
        return out(mixed_B1HK.reshape(batch, 1, width))


class AttentionPool(nn.Module):
    """Attention pooling: x = attention(tokens), then x + mlp(ln(x)); (B, T, D) to float32 (B, D).

    Attributes:
      config: the shape of the tower.
      activation: the activation of the MLP.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.

    Source: SigLIP, arXiv 2303.15343; the head is that of Scaling Vision Transformers, arXiv 2106.04560, section 3.2.
    """

    config: VisionConfig
    activation: Activation
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        cfg = self.config
        attention = ProbeAttention(cfg.heads, self.rules, self.dtype, name="attention")
        mlp = MLP(int(cfg.width * cfg.mlp_ratio), cfg.layers, self.activation, self.rules, self.dtype, name="mlp")
        x_B1D = attention(x_BTD)
        return (x_B1D + mlp(layer_norm("ln", cfg.norm_eps)(x_B1D)))[:, 0].astype(jnp.float32)
