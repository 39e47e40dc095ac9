"""CLIP's text transformer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.config import TextConfig
from tclip_jax.models.layers import Dense, Embedding, layer_norm
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.models.transformer import scan_blocks


class TextTransformer(nn.Module):
    """The text tower: int32 tokens (B, T) to float embeddings (B, embed_dim), not yet normalised.

    T is at most the context length.

    Attributes:
      config: the shape of the tower.
      embed_dim: width of the shared embedding space.
      quick_gelu: whether the activation is x · sigmoid(1.702 x) instead of GELU (erf).
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      remat: whether the backward pass recomputes the activations of each block.
    """

    config: TextConfig
    embed_dim: int
    quick_gelu: bool
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg, width = self.config, self.config.width
        x_BTD = Embedding(cfg.vocab_size, width, self.rules, self.dtype, name="token_embedding")(tokens_BT)
        position_TD = self.param("position_embedding", nn.initializers.normal(0.01), (cfg.context_length, width))
        x_BTD = x_BTD.astype(jnp.float32) + position_TD[: tokens_BT.shape[1]]
        x_BTD = scan_blocks(
            x_BTD.astype(self.dtype),
            layers=cfg.layers,
            heads=cfg.heads,
            mlp_ratio=cfg.mlp_ratio,
            layer_scale=cfg.ls_init_value,
            causal=not cfg.no_causal_mask,
            quick_gelu=self.quick_gelu,
            rules=self.rules,
            dtype=self.dtype,
            remat=self.remat,
        )
        # The end-of-text token has the largest id of the vocabulary.
        batch, length = tokens_BT.shape  # `jax.export` may leave the batch open, so that len would fail
        end_B = tokens_BT.argmax(axis=-1) if cfg.pool_type == "argmax" else jnp.full(batch, length - 1)
        # A masked sum, because the gradient of a gather is a scatter, slow and in the dtype of the computation.
        is_end_BT1 = jnp.expand_dims(jnp.arange(length) == end_B[:, None], -1)
        x_BD = layer_norm("ln_final")(jnp.sum(jnp.where(is_end_BT1, x_BTD, 0), axis=1, dtype=jnp.float32))
        small, bias = nn.initializers.normal(width**-0.5), False
        return Dense(self.embed_dim, self.rules, bias, small, self.dtype, name="projection")(x_BD)
