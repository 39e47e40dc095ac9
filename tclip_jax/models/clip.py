"""CLIP: two towers into one embedding space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import check_tensor, normalize_embedding
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.models.text import TextTransformer
from tclip_jax.models.vision import VisionTransformer
from tclip_jax.parallel.mesh import mesh_in_force
from tclip_jax.ternary import initial_alpha


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
        mesh = mesh_in_force()
        check_tensor(self.config, self.rules, mesh.shape["tensor"] if mesh else 1)
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
    """Freshly drawn float32 parameters: a nested dict of arrays; the same weights whatever the rules are."""
    height, width = model.config.vision.image_size
    images = jnp.zeros((1, height, width, 3))
    tokens = jnp.zeros((1, model.config.text.context_length), jnp.int32)
    return with_learned_scales(model.clone(rules=()).init(key, images, tokens)["params"], model.rules)


def param_shapes(config: CLIPConfig, rules: TernaryRules = ()) -> dict[str, Any]:
    """The parameter tree of a model as jax.ShapeDtypeStruct leaves; allocates nothing.

    Rules add the learned scales that some quantizers have; a packed model and one of another library have none.
    """
    return jax.eval_shape(lambda: init_params(CLIP(config, rules), jax.random.key(0)))


def with_learned_scales(params: Mapping[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Float parameters as they come from elsewhere, and beside them the learned scales that the rules ask for.

    Each starts from its weight; one that is there already stays.
    """
    leaves = flatten_dict(params, sep="/")
    for path in TERNARIZABLE:
        quantizer = find_quantizer(path, rules)
        if quantizer and quantizer.learned and f"{path}_scale" not in leaves:
            weight = jnp.asarray(leaves[path])
            leaves[f"{path}_scale"] = initial_alpha(
                weight.reshape(matrix_shape(weight.shape)), quantizer, input_axis(path)
            )
    return unflatten_dict(leaves, sep="/")
