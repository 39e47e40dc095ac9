"""The state of training: everything that a step changes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.parallel.rules import tree_shardings


class TrainState(flax.struct.PyTreeNode):
    """Invariant: a function of the configuration and `step` steps of data, nothing else.

    Attributes:
      step: int32 scalar, steps done.
      params: `clip`, the model's tree of latent float32 weights, and `heads`, which are dropped after training.
      optimizer: optax's state, moments shaped and sharded like the parameters.
    """

    step: jax.Array
    params: dict[str, Any]
    optimizer: optax.OptState


def init_heads(key: jax.Array, width: int, teacher_width: int) -> dict[str, Any]:
    """Projections of the student's embeddings to the teacher's width, and ICL's learned scale."""
    keys = dict(zip(("image", "text"), jax.random.split(key), strict=True))
    bound = width**-0.5
    heads: dict[str, Any] = {
        name: {
            "kernel": jax.random.uniform(keys[name], (width, teacher_width), minval=-bound, maxval=bound),
            "bias": jnp.zeros(teacher_width),
        }
        for name in keys
    }
    return heads | {"icl_scale": jnp.float32(2.659)}


def init_state(
    model: CLIP, optimizer: optax.GradientTransformation, seed: int, teacher_width: int | None, mesh: Mesh
) -> TrainState:
    """A fresh state, each array made in its own sharding.

    Args:
      teacher_width: embed_dim of the teacher, None for training without one (then there are no heads).
    """

    def init(key: jax.Array) -> TrainState:
        clip_key, heads_key = jax.random.split(key)
        params = {"clip": init_params(model, clip_key)}
        if teacher_width is not None:
            params["heads"] = init_heads(heads_key, model.config.embed_dim, teacher_width)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    key = jax.random.key(seed)
    return jax.jit(init, out_shardings=tree_shardings(jax.eval_shape(init, key), mesh))(key)
