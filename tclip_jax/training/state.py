"""The training state: everything that a step updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import LossConfig
from tclip_jax.training.objective import init_heads


class TrainState(flax.struct.PyTreeNode):
    """The training state. The configuration and the data of `step` steps determine it.

    Attributes:
      step: int32 scalar, the number of steps done.
      params: `clip`, the model's latent float32 weights, and `heads`, the distillation heads, which only training uses.
      optimizer: optax's state. Moments have the shapes and shardings of the parameters; the count is the number of
        updates, which is `step` without the skipped steps.
      average: exponential moving average of `clip` (`optimizer.moving_average`), or None.
    """

    step: jax.Array
    params: dict[str, Any]
    optimizer: optax.OptState
    average: Any = None

    def trees(self) -> dict[str, Any]:
        """Return the trees of a checkpoint: `params` of the model, `average` if there is one, and `training`."""
        heads = {name: tree for name, tree in self.params.items() if name != "clip"}
        average = {} if self.average is None else {"average": self.average}
        rest = {"step": self.step, "heads": heads, "optimizer": self.optimizer}
        return {"params": self.params["clip"], "training": rest} | average

    @classmethod
    def of_trees(cls, trees: Mapping[str, Any]) -> TrainState:
        """Return the state of these trees; the inverse of `trees`."""
        training = trees["training"]
        params = {"clip": trees["params"]} | training["heads"]
        return cls(training["step"], params, training["optimizer"], trees.get("average"))


def init_state(
    model: CLIP,
    optimizer: optax.GradientTransformation,
    seed: int,
    teacher: CLIPConfig | int | None,
    mesh: Mesh,
    loss: LossConfig | None = None,
    *,
    average: bool = False,
    start: Any = None,
) -> TrainState:
    """Return the state at step 0; each array is created in its own sharding.

    Args:
      model: the model.
      optimizer: of all parameters.
      seed: seed of the random parameters.
      teacher: the teacher's configuration, its embed_dim if only its embeddings are known, or None.
      mesh: the devices.
      loss: the losses, which decide about distillation heads.
      average: whether the state has a moving average of the parameters.
      start: the model's parameters, in place of random ones.
    """

    def init(key: jax.Array, start: Any) -> TrainState:
        clip_key, heads_key = jax.random.split(key)
        clip = init_params(model, clip_key) if start is None else start
        params = {"clip": clip}
        if heads := init_heads(heads_key, model.config, teacher, loss or LossConfig()):
            params["heads"] = heads
        copied = jax.tree.map(jnp.copy, clip) if average else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), copied)

    key = jax.random.key(seed)
    return jax.jit(init, out_shardings=tree_shardings(jax.eval_shape(init, key, start), mesh))(key, start)
