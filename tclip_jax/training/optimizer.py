"""AdamW, its schedule, and what of it differs between groups of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of a step: linear from 0 over the warmup, a half cosine down to the recovery's, then that."""
    end = config.recovery_learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps - config.recovery_steps, end
    )


def quant_lambda(steps: int) -> Callable[[jax.Array], jax.Array] | None:
    """The blend λ of a step in w_eff = λ · ŵ + (1 − λ) · w: linear from 0, exactly 1 from `steps` on; None for 1."""
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


def moving_average(average: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """The exponential moving average of parameters, with no weight on what they were before the first update.

    After n updates it is Σᵢ dⁿ⁻ⁱ wᵢ / Σᵢ dⁿ⁻ⁱ over the parameters wᵢ after update i = 1 … n, as that of
    `optax.ema(decay, debias=True)`, and after the first update the parameters themselves.

    Args:
      average: that of n − 1 updates; of none any tree.
      params: wₙ, float32 as the average.
      decay: d, 0 < d < 1.
      updates: n, an int32 scalar.
    """
    # 1 − dⁿ loses half its digits where d is near 1, so not by subtraction.
    share = (1 - decay) / -jnp.expm1(updates * jnp.float32(math.log(decay)))
    return jax.tree.map(lambda old, new: jnp.where(updates > 1, old + share * (new - old), new), average, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101), after clipping of the global norm where one is given.

    Its `update` takes `step`, the steps done, by which the schedule goes. The count in its state is that of updates.

    Raises:
      ValueError: when it is applied: a group's regex that is none, or matches no parameter.
    """

    def decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda update, p, factor, amount: factor * (update + amount * p), updates, params, *_groups(config, params)
        )

    def scale(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    schedule = learning_rate_schedule(config, steps)
    return optax.chain(
        # Something stands there in any case, so that a run can begin to clip when it is resumed.
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
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
