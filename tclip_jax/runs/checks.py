"""Checks of a configuration whose values are valid alone: do they fit each other, and are the plug-ins loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.sources import SOURCES
from tclip_jax.losses.registry import LOSSES
from tclip_jax.models.layers import check_tensor
from tclip_jax.registry import Registry
from tclip_jax.schema import plain
from tclip_jax.ternary import QUANTIZERS, Quantizer

if TYPE_CHECKING:
    from tclip_jax.runs.config import EvalConfig, RunConfig

REGISTRIES: dict[str, Registry[Any]] = {
    "quantizer": QUANTIZERS, "loss": LOSSES, "augmentation": AUGMENTATIONS, "source": SOURCES
}  # fmt: skip


def check_plugin(name: str, plugin: Mapping[str, str]) -> None:
    """Raise ValueError if a plug-in that a run has used is not loaded."""
    what, _, entry = name.partition(" ")
    if what in REGISTRIES and entry not in REGISTRIES[what]:
        raise ValueError(
            f"the run needs the {what} {entry!r} of the plug-in {plain(plugin['file'])}: add --plugin FILE"
        )


def check_run(run: RunConfig) -> None:
    """Raise ValueError for values that are valid alone but contradict each other."""
    for quantizer in (run.quantizer, *(quantizer for _, quantizer in run.rules)):
        try:
            _ = quantizer.rule
        except ValueError as error:
            raise ValueError(f"config.{error}") from None
    check_tensor(run.model, run.rules, max(run.mesh.tensor, 1))
    trace = run.profile_steps
    if trace and not (len(trace) == 2 and trace[0] <= trace[1] <= run.steps):
        raise ValueError(f"config.profile_steps is {trace}: it must be (first, last), first <= last <= steps")
    if run.data.batch_size % run.data.microbatches:
        raise ValueError(
            f"config.data.batch_size {run.data.batch_size} is not divisible by"
            f" config.data.microbatches {run.data.microbatches}"
        )
    if run.gradient_dtype == "bfloat16" != run.dtype:
        raise ValueError("config.gradient_dtype is 'bfloat16', but config.dtype 'float32': set both to 'bfloat16'")
    if run.teacher_int8 and not run.teacher:
        raise ValueError("config.teacher_int8 needs config.teacher: a teacher that runs in the step")
    if run.init and run.inherit:
        raise ValueError("config.init and config.inherit both set the initial weights: leave one of them empty")
    names = [each.name for each in run.evals]
    if len({*names, ""}) <= len(names):
        raise ValueError(
            f"config.evals has the names {names}: each evaluation needs a different name that is not empty"
        )
    if not all(each.source for each in run.evals):
        raise ValueError("config.evals: each evaluation needs a source")
    for each in (run.eval, *run.evals):
        if each.source and each.kind == "loss":
            _check_validation(run, each)
    if run.optimizer.warmup_steps >= run.steps:
        raise ValueError(
            f"config.optimizer.warmup_steps {run.optimizer.warmup_steps} is not below config.steps {run.steps}"
        )
    if run.optimizer.recovery_learning_rate > run.optimizer.learning_rate:
        raise ValueError(
            f"config.optimizer.recovery_learning_rate {run.optimizer.recovery_learning_rate} is above"
            f" config.optimizer.learning_rate {run.optimizer.learning_rate}"
        )
    if run.preprocess.size != run.model.vision.image_size:
        raise ValueError(
            f"config.preprocess.size {run.preprocess.size} is not the model's image size {run.model.vision.image_size}"
        )
    for name, count in (
        ("ternary_warmup_steps", run.ternary_warmup_steps),
        ("ternary_anneal_steps", run.ternary_anneal_steps + run.ternary_warmup_steps),
        ("optimizer.recovery_steps", run.optimizer.recovery_steps + run.optimizer.warmup_steps),
    ):
        if count >= run.steps:
            raise ValueError(f"config.{name} (with the warmup) {count} is not below config.steps {run.steps}")
    learned = next((quantizer.kind for _, quantizer in run.rules if quantizer.learned), None)
    if run.ternary_anneal_steps and learned:
        raise ValueError(
            f"config.ternary_anneal_steps is {run.ternary_anneal_steps}, but quantizers of kind {learned} learn their"
            " scale: soft trits need another kind"
        )
    per_weight = next((quantizer.kind for _, quantizer in run.rules if quantizer.threshold_per_weight), None)
    if run.ternary_anneal_steps and per_weight:
        raise ValueError(
            f"config.ternary_anneal_steps is {run.ternary_anneal_steps}, but quantizers of kind {per_weight} have a"
            " threshold per weight: soft trits need another kind"
        )
    optimizer = run.optimizer
    for _, quantizer in run.rules if optimizer.latent_clip else ():
        _check_latent_clip(optimizer.latent_clip, quantizer)
    if optimizer.recovery_decay == "cosine" and not (optimizer.recovery_steps and optimizer.recovery_learning_rate):
        raise ValueError(
            "config.optimizer.recovery_decay is 'cosine': set recovery_steps and recovery_learning_rate above 0"
        )
    for pattern, _ in run.optimizer.groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.optimizer.groups {pattern!r} is not a regular expression: {error}") from None
    if run.teacher and run.data.teacher_cache:
        raise ValueError("config.teacher and config.data.teacher_cache are two teachers: set one of them")
    if run.loss.needs_teacher and not (run.teacher or run.data.teacher_cache):
        raise ValueError(
            f"config.loss.{run.loss.needs_teacher[0]} needs a teacher: set config.teacher to a workdir or an artifact"
        )
    if run.loss.states and run.data.teacher_cache:
        raise ValueError("config.loss.hidden and relations need a teacher in the step: a cache holds only embeddings")
    for tower, depth in (("image", run.model.vision.layers), ("text", run.model.text.layers)):
        if run.loss.states and tower in run.loss.towers:
            for layer in run.loss.layers:
                if not -depth <= layer < depth:
                    raise ValueError(f"config.loss.layers has {layer}: the {tower} tower has {depth} layers")


def _check_latent_clip(bound: float, quantizer: Quantizer) -> None:
    """Raise ValueError if clipping would lower the scale with every step, until few weights are zeros.

    Clipping spreads magnitudes towards an even distribution up to the bound. If those of such a distribution are
    clipped too, nothing ends it. Learned scales do not follow the weights; those of plug-ins are not checked.
    """
    # The scale of magnitudes that are spread evenly over 0 … 1.
    scale = {"factor": quantizer.factor / 2, "twn": 0.675, "least_squares": 2 / 3, "sherry": 0.6}.get(quantizer.kind)
    if scale and bound * scale < 1:
        raise ValueError(
            f"config.optimizer.latent_clip is {bound:g}, which would lower the scales of {quantizer.description} with"
            f" every step: set it to 0, or to {1 / scale:.3g} or more"
        )


def _check_validation(run: RunConfig, config: EvalConfig) -> None:
    """Raise ValueError for a validation loss without held-out data, or without a loss."""
    key = f"config.evals {config.name}: kind loss" if config.name else "config.eval: kind loss"
    if config.suite:
        raise ValueError(f"{key} takes a source, not a suite: remove suite {config.suite!r}")
    if (config.source, config.split) == (run.data.source, run.data.split):
        raise ValueError(f"{key} needs held-out pairs, but the run trains on {config.source}, split {config.split}")
    if run.data.teacher_cache and set(run.loss.weights) == set(run.loss.needs_teacher):
        raise ValueError(f"{key} has no loss without a teacher, and a cache has no embeddings of held-out images")
