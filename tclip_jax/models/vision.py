"""The vision transformer of CLIP and SigLIP."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from tclip_jax.models.attention_pool import AttentionPool
from tclip_jax.models.config import Activation, VisionConfig
from tclip_jax.models.layers import Dense, Identity, find_bias, find_weight, layer_norm, multiply
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.models.transformer import scan_blocks

PATCHES = "patches"  # `checkpoint_name` of the pixels of patches, from which `remat` recomputes their embeddings


class PatchEmbedding(nn.Module):
    """A convolution with stride = kernel size, computed as a matrix product; the kernel is HWIO.

    Attributes:
      patch: size of a patch in pixels.
      width: number of output channels.
      use_bias: whether a bias is added.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
    """

    patch: int
    width: int
    use_bias: bool
    rules: TernaryRules
    dtype: jax.typing.DTypeLike

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        shape = (self.patch, self.patch, images_BHWC.shape[-1], self.width)
        kernel = find_weight(self, "kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape, self.rules)
        patches_BNK = checkpoint_name(patchify(images_BHWC, self.patch).astype(self.dtype), PATCHES)
        x_BND = multiply(patches_BNK, kernel).astype(jnp.float32)
        return x_BND + find_bias(self, self.width, kernel) if self.use_bias else x_BND


class VisionTransformer(nn.Module):
    """The image tower: normalised float pixels (B, H, W, 3) to float embeddings (B, embed_dim), not yet normalised.

    The parameters `class_embedding`, `ln_pre`, `pool` and `projection` exist if the configuration has them.

    Attributes:
      config: the shape of the tower.
      embed_dim: width of the shared embedding space.
      activation: the activation of the MLPs.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation.
      remat: whether the backward pass recomputes the activations of each block, and the embeddings of patches.
      attention: implementation of the attention, see `self_attention`.
      gradient_dtype: dtype in which devices add their sums of the gradients of the blocks' matrices.
    """

    config: VisionConfig
    embed_dim: int
    activation: Activation
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        cfg = self.config
        embed = VisionTransformer._embed
        if self.remat:
            embed = nn.remat(embed, policy=jax.checkpoint_policies.save_only_these_names(PATCHES))
        x_BTD = scan_blocks(
            embed(self, images_BHWC),
            cfg,
            activation=self.activation,
            causal=False,
            rules=self.rules,
            dtype=self.dtype,
            remat=self.remat,
            attention=self.attention,
            gradient_dtype=self.gradient_dtype,
        )
        ln_post = layer_norm("ln_post", cfg.norm_eps)
        # LayerNorm and the selection of the class token commute.
        if cfg.final_ln_after_pool or cfg.pool_type == "tok":
            x_BD = ln_post(self._pool(x_BTD))
        else:
            x_BD = self._pool(ln_post(x_BTD))
        if not cfg.projection:
            return Identity(name="projection")(x_BD)
        init = nn.initializers.normal(cfg.width**-0.5)
        project = Dense(
            self.embed_dim, self.rules, use_bias=False, kernel_init=init, dtype=self.dtype, name="projection"
        )
        return project(x_BD)

    def _embed(self, images_BHWC: jax.Array) -> jax.Array:
        """Return the input of the first block, (B, T, D): patches, and the class token, with their positions."""
        cfg, width = self.config, self.config.width
        patches = PatchEmbedding(cfg.patch_size, width, cfg.patch_bias, self.rules, self.dtype, name="patch_embedding")
        # In float32, because the gradients of both embeddings are sums over the batch.
        x_BTD = patches(images_BHWC)
        small = nn.initializers.normal(width**-0.5)
        if cfg.class_token:
            class_D = self.param("class_embedding", small, (width,))
            batch = x_BTD.shape[0]  # `jax.export` may leave it open, so that len would fail
            x_BTD = jnp.concatenate([jnp.broadcast_to(class_D, (batch, 1, width)), x_BTD], axis=1)
        x_BTD = (x_BTD + self.param("position_embedding", small, (cfg.tokens, width))).astype(self.dtype)
        return x_BTD if cfg.no_ln_pre else layer_norm("ln_pre", cfg.norm_eps)(x_BTD).astype(self.dtype)

    def _pool(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.pool_type == "map":
            return AttentionPool(self.config, self.activation, self.rules, self.dtype, name="pool")(x_BTD)
        if self.config.pool_type == "avg":
            return x_BTD[:, int(self.config.class_token) :].mean(axis=1, dtype=jnp.float32)
        return x_BTD[:, 0]


def patchify(images_BHWC: jax.Array, patch: int) -> jax.Array:
    """Cut images (B, H, W, C) into patches (B, N, patch · patch · C).

    Patches are in row order, each flattened as (row, column, channel). Rows and columns beyond the last whole patch are
    dropped, as by a convolution without padding.
    """
    batch, height, width, channels = images_BHWC.shape
    rows, columns = height // patch, width // patch
    x = images_BHWC[:, : rows * patch, : columns * patch].reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
