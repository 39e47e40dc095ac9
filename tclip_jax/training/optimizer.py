"""AdamW, its schedule, and what of it differs between groups of parameters."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tclip_jax.parallel.rules import path_of
from tclip_jax.training.sections import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of a step: linear from 0 over the warmup, a half cosine down to the recovery's, then that."""
    end = config.recovery_learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps - config.recovery_steps, end
    )


def ternary_share(steps: int) -> Callable[[jax.Array], jax.Array] | None:
    """The share of ternary weights that is quantized at a step: linear from 0, and exactly 1 from `steps` on."""
    if not steps:
        return None
    return lambda step: jnp.where(step < steps, step / jnp.float32(steps), 1.0)


def decays(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: matrices, not vectors, scalars and learned scales.

    A layer axis does not count.
    """

    def decay(key_path: tuple[Any, ...], leaf: jax.Array) -> bool:
        path = path_of(key_path)
        return leaf.ndim - ("/blocks/" in path) >= 2 and not path.endswith("_scale")

    return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), after clipping of the global norm where one is given.

    Raises:
      ValueError: when it is applied: a group's regex that is none, or matches no parameter.
    """

    def decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda update, p, factor, amount: factor * (update + amount * p), updates, params, *_groups(config, params)
        )

    return optax.chain(
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def _groups(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """For each parameter the factor of its learning rate, and its weight decay."""
    unused = {pattern for pattern, _ in config.groups}

    def changes(key_path: tuple[Any, ...], decayed: bool) -> tuple[float, float]:
        for pattern, values in config.groups:
            if re.fullmatch(pattern, path_of(key_path)):
                unused.discard(pattern)
                amount = values.get("weight_decay", config.weight_decay if decayed else 0.0)
                return values.get("learning_rate", 1.0), amount
        return 1.0, config.weight_decay if decayed else 0.0

    both = jax.tree_util.tree_map_with_path(changes, decays(params))
    if unused:
        raise ValueError(f"config.optimizer.groups: {sorted(unused)[0]!r} matches no parameter of its own")
    return tuple(jax.tree.map(lambda pair, i=i: pair[i], both, is_leaf=lambda x: isinstance(x, tuple)) for i in (0, 1))
