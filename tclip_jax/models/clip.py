"""CLIP: two towers into one embedding space."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import normalize_embedding
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.models.text import TextTransformer
from tclip_jax.models.vision import VisionTransformer


class CLIP(nn.Module):
    """The contrastive image-text model of Radford et al., arXiv 2103.00020, with ternary weights where `rules` say so.

    Parameters may hold `TernaryTensor` leaves in place of float weights; they are used as they are.

    Attributes:
      config: the shape of both towers.
      rules: which parameters are ternary, and how.
      dtype: of the computation; parameters, LayerNorm, softmax and the returned embeddings stay float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
    """

    config: CLIPConfig
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        shared = (self.config.embed_dim, self.config.quick_gelu, self.rules, self.dtype, self.remat)
        self.image = VisionTransformer(self.config.vision, *shared)
        self.text = TextTransformer(self.config.text, *shared)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

    def encode_image(self, images_BHWC: jax.Array) -> jax.Array:
        """Normalised float images to L2-normalised float32 embeddings (B, embed_dim)."""
        return normalize_embedding(self.image(images_BHWC))

    def encode_text(self, tokens_BT: jax.Array) -> jax.Array:
        """int32 tokens to L2-normalised float32 embeddings (B, embed_dim)."""
        return normalize_embedding(self.text(tokens_BT))

    def __call__(self, images_BHWC: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Image embeddings, text embeddings, and the scale exp(logit_scale) of their similarities."""
        return self.encode_image(images_BHWC), self.encode_text(tokens_BT), jnp.exp(self.logit_scale)


def init_params(model: CLIP, key: jax.Array) -> dict[str, Any]:
    """Freshly drawn float32 parameters: a nested dict of arrays."""
    height, width = model.config.vision.image_size
    images = jnp.zeros((1, height, width, 3))
    tokens = jnp.zeros((1, model.config.text.context_length), jnp.int32)
    return model.init(key, images, tokens)["params"]


def param_shapes(config: CLIPConfig) -> dict[str, Any]:
    """The parameter tree of a model as jax.ShapeDtypeStruct leaves; allocates nothing."""
    return jax.eval_shape(lambda key: init_params(CLIP(config), key), jax.random.key(0))
