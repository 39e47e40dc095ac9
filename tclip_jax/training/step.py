"""The training step, a pure function: (state, batch) -> (state, metrics)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tclip_jax.data.sources import FAULTS
from tclip_jax.losses.grad_cache import gradient_in_parts
from tclip_jax.models.layers import Softness
from tclip_jax.parallel.mesh import BATCH_AXES
from tclip_jax.runs.config import LossConfig
from tclip_jax.training.objective import Batch, Encoders, Metrics, Objective
from tclip_jax.training.optimizer import moving_average, updates_done
from tclip_jax.training.state import TrainState

Schedule = Callable[[jax.Array], Softness]
MAX_LOGIT_SCALE = math.log(100)


def make_train_step(
    student: Encoders,
    teacher: Encoders | float | None,
    optimizer: optax.GradientTransformationExtraArgs,
    loss: LossConfig,
    soften: Schedule | None = None,
    ema_decay: float = 0.0,
    microbatches: int = 1,
    freeze: Callable[[Any], Any] = lambda params: params,
    noise_seed: int | None = None,
    constrain: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """Return the step: (state, batch, teacher's parameters or None) -> (next state, metrics as float32 scalars).

    If the loss or the gradient is not finite, or the batch has no usable sample, the step is skipped: only the step
    number changes, and the metric `skipped_steps` is 1 instead of 0.

    Args:
      student: the model that is trained.
      teacher: the teacher's model if it runs in the step, its logit scale if batches hold its embeddings, or None.
      optimizer: optimizer of all parameters, see `make_optimizer`.
      loss: weights and options of the losses.
      soften: maps the step to how far weights are from ternary; None for hard trits.
      ema_decay: decay of the moving average, if the state has one.
      microbatches: parts into which a batch is split to save memory; the result does not depend on it.
      freeze: returns its argument, the parameters, with the gradients of frozen ones stopped.
      noise_seed: random seed of quantizers that draw random numbers, other ones in each step; None if there are none.
      constrain: maps the updated parameters to those that are kept.
    """

    objective = Objective(student, teacher, loss)

    def train_step(state: TrainState, batch: Batch, teacher_params: Any) -> tuple[TrainState, Metrics]:
        softness = soften(state.step) if soften else None
        noise = None if noise_seed is None else jax.random.fold_in(jax.random.key(noise_seed), state.step)
        gradients, metrics = gradient_in_parts(
            lambda params, rows: objective.encode(freeze(params), teacher_params, rows, batch, softness, noise),
            lambda params, embeddings, of_layers: objective.loss(
                freeze(params), teacher_params, batch, embeddings, of_layers
            ),
            state.params,
            batch,
            microbatches,
            BATCH_AXES,
        )
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params, step=state.step)
            params = optax.apply_updates(state.params, updates)
            params = constrain(params)
        # CLIP's bound; SigLIP's scale has none, and is above it in published models.
        bound = None if loss.sigmoid else MAX_LOGIT_SCALE
        params["clip"]["logit_scale"] = jnp.clip(params["clip"]["logit_scale"], 0, bound)
        average = state.average
        if average is not None:
            with jax.named_scope("average"):
                average = moving_average(average, params["clip"], ema_decay, updates_done(optimizer_state))
        metrics |= {"gradient_norm": optax.tree.norm(gradients)}
        usable = jnp.any(batch["weight"] > 0)
        changes = usable & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        updated = keep_if(changes, TrainState(state.step + 1, params, optimizer_state, average), state)
        metrics |= {
            "logit_scale": jnp.exp(updated.params["clip"]["logit_scale"]),
            "bad_samples": jnp.sum(batch["weight"] == 0).astype(jnp.float32),
            "skipped_steps": 1 - changes.astype(jnp.float32),
        }
        if "fault" in batch:
            metrics |= {f"bad/{kind}": jnp.sum(batch["fault"] == i) for i, kind in enumerate(FAULTS) if i}
        return updated, metrics

    return train_step


def keep_if(changes: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return `new` if `changes`, otherwise `old` with the step of `new`, which the schedules follow."""
    return jax.tree.map(lambda a, b: jnp.where(changes, a, b), new, old).replace(step=new.step)
