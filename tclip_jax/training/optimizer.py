"""AdamW, its learning rate schedule and parameter groups, the quantization blend, and the moving average."""

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
    """Returns the schedule: linear warmup from 0, cosine decay to the recovery learning rate, then that rate."""
    end = config.recovery_learning_rate
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, steps - config.recovery_steps, end
    )


def quant_lambda(steps: int) -> Callable[[jax.Array], jax.Array] | None:
    """Returns the schedule of the blend λ in w_eff = λ · ŵ + (1 − λ) · w: linear from 0, exactly 1 from `steps` on.

    None for λ = 1 throughout, if `steps` is 0.
    """
    if not steps:
        return None
    return lambda step: jnp.where(step < steps, step / jnp.float32(steps), 1.0)


def decays(params: Any) -> Any:
    """Returns a tree with True for the leaves with weight decay: matrices, but not vectors, scalars or learned scales.

    The leading layer axis of stacked blocks is not counted.
    """

    def decay(key_path: tuple[Any, ...], leaf: jax.Array) -> bool:
        path = path_of(key_path)
        return leaf.ndim - ("/blocks/" in path) >= 2 and not path.endswith("_scale")

    return jax.tree_util.tree_map_with_path(decay, params)


def moving_average(average: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """Returns the exponential moving average of the parameters after every update; initial parameters have no weight.

    After n updates it is Σᵢ dⁿ⁻ⁱ wᵢ / Σᵢ dⁿ⁻ⁱ, where wᵢ are the parameters after update i = 1 … n, as in
    `optax.ema(decay, debias=True)`. After the first update it equals the parameters.

    Args:
      average: the average after n − 1 updates; any tree if n is 1.
      params: wₙ, float32 as the average.
      decay: d, 0 < d < 1.
      updates: n, an int32 scalar.
    """
    # The subtraction 1 − dⁿ would lose half its digits for d near 1; expm1 does not.
    share = (1 - decay) / -jnp.expm1(updates * jnp.float32(math.log(decay)))
    return jax.tree.map(lambda old, new: jnp.where(updates > 1, old + share * (new - old), new), average, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW (arXiv 1711.05101), with clipping of the gradient's global norm if `config.clip_norm` is set.

    Its `update` takes `step`, the number of steps done, which the schedule follows. The count in its state is the
    number of updates, without skipped steps.

    Raises:
      ValueError: in `update`, if a group's regex is the first match of no parameter.
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
        # With or without clipping, the chain has as many elements, so that a resumed run can change it.
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.stateless(decay),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
    )


def _groups(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """Returns a tree of learning rate factors, and a tree of weight decays."""
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
