"""The text transformer of CLIP and SigLIP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.config import Activation, TextConfig
from tclip_jax.models.layers import Dense, Embedding, Identity, layer_norm
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.models.transformer import scan_blocks


class TextTransformer(nn.Module):
    """The text tower: int32 tokens (B, T) to float embeddings (B, embed_dim), not yet normalised.

    T is at most the context length.

    Attributes:
      config: the shape of the tower.
      embed_dim: width of the shared embedding space.
      activation: the activation of the MLPs.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      remat: whether the backward pass recomputes the activations of each block.
      attention: implementation of the attention, see `self_attention`.
      gradient_dtype: dtype in which devices add their sums of the gradients of the blocks' matrices.
    """

    config: TextConfig
    embed_dim: int
    activation: Activation
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        cfg, width = self.config, self.config.width
        x_BTD = Embedding(cfg.vocab_size, width, self.rules, self.dtype, name="token_embedding")(tokens_BT)
        position_TD = self.param("position_embedding", nn.initializers.normal(0.01), (cfg.context_length, width))
        x_BTD = x_BTD.astype(jnp.float32) + position_TD[: tokens_BT.shape[1]]
        x_BTD = scan_blocks(
            x_BTD.astype(self.dtype),
            cfg,
            activation=self.activation,
            causal=not cfg.no_causal_mask,
            rules=self.rules,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            gradient_dtype=self.gradient_dtype,
        )
        # A masked sum, because the gradient of a gather is a scatter, slow and in the dtype of the computation.
        is_end_BT1 = jnp.expand_dims(jnp.arange(tokens_BT.shape[1]) == pooled_position(tokens_BT, cfg)[:, None], -1)
        pooled_BD = jnp.sum(jnp.where(is_end_BT1, x_BTD, 0), axis=1, dtype=jnp.float32)
        x_BD = layer_norm("ln_final", cfg.norm_eps)(pooled_BD)
        if cfg.proj_type == "none":
            return Identity(name="projection")(x_BD)
        small = nn.initializers.normal(width**-0.5)
        return Dense(self.embed_dim, self.rules, cfg.proj_bias, small, self.dtype, name="projection")(x_BD)


def pooled_position(tokens_BT: jax.Array, config: TextConfig) -> jax.Array:
    """Return the position of the token whose state becomes the embedding, int32 (B,).

    The end-of-text token of CLIP has the largest id of the vocabulary. A text without `eos_id` is pooled at 0.
    """
    if config.pool_type == "argmax":
        return tokens_BT.argmax(axis=-1)
    if config.pool_type == "eos":
        return (tokens_BT == config.eos_id).argmax(axis=-1)
    batch, length = tokens_BT.shape  # `jax.export` may leave the batch open, so that len would fail
    return jnp.full(batch, length - 1 if config.pool_type == "last" else 0)
