"""AdamW with warmup and cosine decay."""

from __future__ import annotations

from typing import Any

import jax
import optax

from tclip_jax.parallel.rules import path_of
from tclip_jax.training.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of a step: linear from 0 over the warmup, then a half cosine to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, steps)


def decays(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: matrices, not vectors, scalars and learned scales.

    A layer axis does not count.
    """

    def decay(key_path: tuple[Any, ...], leaf: jax.Array) -> bool:
        path = path_of(key_path)
        return leaf.ndim - ("/blocks/" in path) >= 2 and not path.endswith("_scale")

    return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), after clipping of the global norm where one is given."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
