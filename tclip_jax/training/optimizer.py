"""Optimizers, their learning rate schedule and parameter groups, the soft phase, and the moving average."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from tclip_jax.models.layers import Softness
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer, input_axis, matrix_shape
from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.config import OptimizerConfig
from tclip_jax.ternary import find_levels


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the schedule: linear warmup from 0 and cosine decay, then the recovery phase.

    With `recovery_decay` "none", the cosine decay ends at the recovery learning rate, which recovery keeps. With
    "cosine" it ends at 0, and recovery is a second cosine decay, from its own rate to 0 (FTerViT, arXiv 2605.21171).
    """
    main, end = steps - config.recovery_steps, config.recovery_learning_rate
    again = bool(config.recovery_steps) and config.recovery_decay == "cosine"
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, main, 0.0 if again else end
    )
    if not again:
        return schedule
    return optax.join_schedules([schedule, optax.cosine_decay_schedule(end, config.recovery_steps)], [main])


def soft_phase(
    blend_steps: int, temperature: float = 0.0, anneal_steps: int = 0
) -> Callable[[jax.Array], Softness] | None:
    """Return the schedule of the blend λ and of the temperature τ, from full precision to hard trits.

    λ rises linearly from 0 to exactly 1 at `blend_steps`. Until then τ is `temperature`; then it falls to exactly 0 by
    half a cosine over `anneal_steps`.

    Returns:
      The schedule by the number of steps done; None if weights are ternary throughout.

    Source: the phases of Hestia, arXiv 2601.20745.
    """
    if not blend_steps and not anneal_steps:
        return None

    def softness(step: jax.Array) -> Softness:
        quant_lambda = jnp.where(step < blend_steps, step / jnp.float32(max(blend_steps, 1)), 1.0)
        if not anneal_steps:
            return Softness(quant_lambda)
        done = jnp.clip((step - blend_steps) / jnp.float32(anneal_steps), 0, 1)
        falling = temperature * (1 + jnp.cos(jnp.pi * done)) / 2
        return Softness(quant_lambda, jnp.where(done < 1, falling, 0.0))

    return softness


def clip_latent(params: Any, rules: TernaryRules, config: OptimizerConfig) -> Any:
    """Clip the latent weights of ternary parameters to `latent_clip` times the scale of their group; 0: no clipping.

    A weight beyond its scale has the trit ±1 whatever its size, and grows as long as its gradient keeps its sign. The
    clipped weight returns to the threshold sooner, as in BinaryConnect (arXiv 1511.00363), whose bound is the level.
    The scale is that of the weights before they are clipped, which lowers it for the kinds that compute it from them.

    Args:
      params: parameters of the run, the latent weights of its model under "clip".
      rules: (regex, quantizer) pairs that select the ternary parameters.
      config: its `latent_clip`, in units of the scale; its `groups` may freeze parameters, which stay as they are.
    """
    bound = config.latent_clip
    if not bound:
        return params
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def clipped(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        head, _, path = path_of(key_path).partition("/")
        quantizer = find_quantizer(path, rules) if head == "clip" and path in TERNARIZABLE else None
        if quantizer is None or quantizer.uniform or _group(config, key_path) is None:
            return leaf
        w, axis = leaf.reshape(matrix_shape(leaf.shape)), input_axis(path)
        scale, _ = find_levels(w, quantizer, axis, leaves.get(f"clip/{path}_scale")).expanded(w.shape[axis], axis)
        return jnp.clip(w, -bound * scale, bound * scale).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(clipped, params)


def decays(params: Any) -> Any:
    """Return a tree with True for the leaves with weight decay: matrices, but not vectors, scalars or learned scales.

    The leading layer axis of stacked blocks is not counted.
    """

    def decay(key_path: tuple[Any, ...], leaf: jax.Array) -> bool:
        path = path_of(key_path)
        return leaf.ndim - ("/blocks/" in path) >= 2 and not path.endswith("_scale")

    return jax.tree_util.tree_map_with_path(decay, params)


def moving_average(average: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """Return the exponential moving average of the parameters after every update; initial parameters have no weight.

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
    """Return a run's optimizer: clipping of the global norm, `OPTIMIZERS[name]`, decoupled weight decay, schedule.

    `update` takes `step`, the number of steps done, which the schedule follows. The optimizer's own count is that of
    updates, which excludes skipped steps. Frozen parameters have no moments, and their gradients do not enter the norm.

    Raises:
      ValueError: in `init` or `update`, a group has no parameter.
    """

    def decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda update, p, factor, amount: factor * (update + amount * p), updates, params, *_groups(config, params)
        )

    def scale(updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any) -> tuple[Any, Any]:
        rate = schedule(step)
        return jax.tree.map(lambda update: -rate * update, updates), state

    schedule = learning_rate_schedule(config, steps)
    optimizer = optax.chain(
        # The chain has the same length with and without clipping, so that a resumed run can change `clip_norm`.
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        OPTIMIZERS[config.name](config),
        optax.stateless(decay),
        optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), scale),
    )
    if not config.freezes:
        return optimizer
    parts = {"trained": optimizer, "frozen": optax.set_to_zero()}
    return optax.partition(
        parts, lambda params: jax.tree.map(lambda each: "frozen" if each else "trained", frozen(config, params))
    )


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101)."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adafactor as in "Scaling Vision Transformers" (arXiv 2106.04560): first moment b1, β₂ = min(b2, 1 − t⁻⁰·⁸)."""

    def decay_rate(step: Any, power: Any) -> jax.Array:
        return jnp.minimum(config.b2, 1 - jnp.float32(step + 1) ** -power)

    return optax.chain(
        optax.scale_by_factored_rms(decay_rate_fn=decay_rate),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False, accumulator_dtype=config.mu_dtype),
    )


def _lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """Lion (arXiv 2302.06675)."""
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.mu_dtype)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) with momentum b1 for the matrices of blocks, AdamW for all other parameters.

    A matrix's update has the root mean square of AdamW's, so learning rate and weight decay carry over (equation 4).
    """

    def labels(params: Any) -> Any:
        def label(key_path: tuple[Any, ...], is_matrix: bool) -> str:
            return "muon" if is_matrix and "/blocks/" in path_of(key_path) else "adamw"

        return jax.tree_util.tree_map_with_path(label, decays(params))

    def last_two_axes(updates: Any) -> Any:
        return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)

    def like_adamw(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda x: 0.2 * math.sqrt(max(x.shape[-2:])) * x, updates)

    momentum = optax.contrib.scale_by_muon(
        beta=config.b1, mu_dtype=config.mu_dtype, weight_dimension_numbers=last_two_axes
    )
    return optax.partition(
        {"muon": optax.chain(momentum, optax.stateless(like_adamw)), "adamw": _adamw(config)}, labels
    )


# From the value of `optimizer.name` to the transformation of gradients, before weight decay and the learning rate.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
}


def updates_done(state: optax.OptState) -> jax.Array:
    """The number of updates that an optimizer's state has applied: int32 scalar."""
    (_, count), *_ = optax.tree.get_all_with_path(state, "count")
    return count


def frozen(config: OptimizerConfig, params: Any) -> Any:
    """True for the parameters that `optimizer.groups` freezes.

    Raises:
      ValueError: a group's regex is not the first to match any parameter.
    """
    _check_groups(config, params)
    return jax.tree_util.tree_map_with_path(lambda path, _: _group(config, path) is None, params)


def stop_gradients(config: OptimizerConfig, params: Any) -> Any:
    """Stop the gradients of frozen parameters, so that no backward pass is computed for these alone."""
    if not config.freezes:
        return params
    return jax.tree.map(lambda stop, p: jax.lax.stop_gradient(p) if stop else p, frozen(config, params), params)


def _group(config: OptimizerConfig, key_path: tuple[Any, ...]) -> dict[str, float] | None:
    """Return the values of the first group whose regex matches a path: {} without a match, None if it freezes."""
    path = path_of(key_path)
    return next((values for pattern, values in config.groups if re.fullmatch(pattern, path)), {})


def _groups(config: OptimizerConfig, params: Any) -> tuple[Any, Any]:
    """For each trained parameter the factor of its learning rate, and its weight decay."""
    if not config.freezes:
        _check_groups(config, params)

    def factor(key_path: tuple[Any, ...], _: Any) -> float:
        return (_group(config, key_path) or {}).get("learning_rate", 1.0)

    def amount(key_path: tuple[Any, ...], decayed: bool) -> float:
        return (_group(config, key_path) or {}).get("weight_decay", config.weight_decay if decayed else 0.0)

    decayed = decays(params)
    return tuple(jax.tree_util.tree_map_with_path(values, decayed) for values in (factor, amount))


def _check_groups(config: OptimizerConfig, params: Any) -> None:
    unused = dict.fromkeys(pattern for pattern, _ in config.groups)
    for key_path, _ in jax.tree_util.tree_leaves_with_path(params):
        matching = (pattern for pattern, _ in config.groups if re.fullmatch(pattern, path_of(key_path)))
        unused.pop(next(matching, ""), None)
    if unused:
        raise ValueError(f"config.optimizer.groups: {next(iter(unused))!r} matches no parameter of its own")
