"""The CLIP model, and SigLIP: an image tower and a text tower with one embedding space."""

from __future__ import annotations

import functools
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
    """The contrastive image-text model of CLIP (arXiv 2103.00020) or SigLIP (arXiv 2303.15343), with ternary weights as
    `rules` define.

    The parameter `logit_bias` exists if the configuration has `init_logit_bias`.

    The parameter tree may hold `TernaryTensor` or `PackedTensor` leaves instead of float weights; they are used as they
    are.

    Attributes:
      config: the shape of both towers.
      rules: (regex, quantizer) pairs that select the ternary parameters.
      dtype: dtype of the computation. Parameters, LayerNorm, softmax and the embeddings are float32.
      remat: whether the backward pass recomputes the activations of each block instead of storing them.
      attention: implementation of the attention, see `models.attention.self_attention`.
      gradient_dtype: dtype in which devices add their sums of the gradients of the blocks' matrices: float32, or
        `dtype`.
    """

    config: CLIPConfig
    rules: TernaryRules = ()
    dtype: jax.typing.DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"
    gradient_dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        mesh = mesh_in_force()
        check_tensor(self.config, self.rules, mesh.shape["tensor"] if mesh else 1)
        config, width = self.config, self.config.embed_dim
        shared = self.rules, self.dtype, self.remat, self.attention, self.gradient_dtype
        self.image = VisionTransformer(config.vision, width, config.activation(config.vision), *shared)
        self.text = TextTransformer(config.text, width, config.activation(config.text), *shared)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self._initial_scale()), ())
        if config.init_logit_bias is not None:
            self.param("logit_bias", nn.initializers.constant(config.init_logit_bias), ())

    def _initial_scale(self) -> float:
        """CLIP's 1 / 0.07, or with a bias SigLIP's 10, as a logarithm."""
        return math.log(1 / 0.07) if self.config.init_logit_bias is None else math.log(10)

    def encode_image(self, images_BHWC: jax.Array) -> jax.Array:
        """Encode images.

        Args:
          images_BHWC: normalised float pixels (B, H, W, 3).

        Returns:
          L2-normalised embeddings, float32 (B, embed_dim).
        """
        return normalize_embedding(self.image(images_BHWC))

    def encode_text(self, tokens_BT: jax.Array) -> jax.Array:
        """Encode texts.

        Args:
          tokens_BT: int32 tokens (B, T), T at most the context length.

        Returns:
          L2-normalised embeddings, float32 (B, embed_dim).
        """
        return normalize_embedding(self.text(tokens_BT))

    def __call__(self, images_BHWC: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Encode images and texts.

        Returns:
          Image embeddings, text embeddings, and the scale exp(logit_scale) of their similarities.
        """
        return self.encode_image(images_BHWC), self.encode_text(tokens_BT), jnp.exp(self.logit_scale)


def init_params(model: CLIP, key: jax.Array) -> dict[str, Any]:
    """Initialise the parameters of a model.

    Args:
      model: the model; the weights do not depend on its rules.
      key: a PRNG key.

    Returns:
      A nested dict of float32 arrays, with the learned scales that the rules need.
    """
    plain = model.clone(rules=(), attention="reference")  # a forced one may not take a single row
    return with_learned_scales(_init(plain, key), model.rules)


@functools.partial(jax.jit, static_argnums=0)  # compiled once for a model, instead of hundreds of small programs
def _init(model: CLIP, key: jax.Array) -> dict[str, Any]:
    height, width = model.config.vision.image_size
    images = jnp.zeros((1, height, width, 3))
    tokens = jnp.zeros((1, model.config.text.context_length), jnp.int32)
    return model.init(key, images, tokens)["params"]


def param_shapes(config: CLIPConfig, rules: TernaryRules = ()) -> dict[str, Any]:
    """Compute the parameter tree of a model as jax.ShapeDtypeStruct leaves, without allocating arrays.

    Args:
      config: the shape of both towers.
      rules: add the learned scales of their quantizers. Packed models and models of other libraries have none.

    Returns:
      A nested dict as of `init_params`.
    """
    return jax.eval_shape(lambda: init_params(CLIP(config, rules), jax.random.key(0)))


def with_learned_scales(params: Mapping[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Add the learned scales that `rules` need to float parameters.

    Args:
      params: float parameters. Learned scales that they have are kept.
      rules: (regex, quantizer) pairs that select the ternary parameters.

    Returns:
      The parameters; each new scale is the initial α of its weight.
    """
    leaves = flatten_dict(params, sep="/")
    for path in TERNARIZABLE:
        quantizer = find_quantizer(path, rules)
        if path in leaves and quantizer and quantizer.learned and f"{path}_scale" not in leaves:
            weight = jnp.asarray(leaves[path])
            leaves[f"{path}_scale"] = initial_alpha(
                weight.reshape(matrix_shape(weight.shape)), quantizer, input_axis(path)
            )
    return unflatten_dict(leaves, sep="/")
