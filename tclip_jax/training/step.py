"""One step of training, pure: state and batch in, state and metrics out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tclip_jax.data.images import normalize
from tclip_jax.losses import contrastive, distillation
from tclip_jax.models.clip import CLIP
from tclip_jax.models.layers import normalize_embedding
from tclip_jax.training.config import LossConfig
from tclip_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Embeddings = tuple[jax.Array, jax.Array, jax.Array]  # of images, of texts, and the scale of their similarities
MAX_LOGIT_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class Encoders:
    """A model with the pixel statistics it was trained with: those of teacher and student may differ."""

    model: CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, params: Any, batch: Batch) -> Embeddings:
        """Embeddings of a batch's uint8 images and its tokens."""
        pixels = normalize(batch["image"], self.mean, self.std)
        return self.model.apply({"params": params}, pixels, batch["tokens"])  # type: ignore[return-value]


def objective(
    params: Any, batch: Batch, student: Encoders, teacher: Embeddings | None, loss: LossConfig
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the loss terms that have a weight, and each; `teacher` is what it says of the batch."""
    image, text, scale = student(params["clip"], batch)
    weight, positives = batch["weight"], contrastive.positive_pairs(batch["tokens"], loss.positives)
    terms: Metrics = {}
    if loss.task:
        terms["task"] = contrastive.info_nce(image, text, scale, positives, weight)
    if teacher is not None:
        teacher_image, teacher_text, _ = teacher
        heads = params["heads"]
        to_image, to_text = _project(heads["image"], image), _project(heads["text"], text)
        if loss.crd:
            terms["crd"] = distillation.crd(image, text, scale, *teacher, weight)
        if loss.icl:
            pair = (to_image, to_text, teacher_image, teacher_text)
            terms["icl"] = distillation.icl(*pair, heads["icl_scale"], positives, weight)
        if loss.fd:
            distance = functools.partial(distillation.feature_distillation, kind=loss.fd_kind, weight=weight)
            terms["fd"] = distance(to_image, teacher_image) + distance(to_text, teacher_text)
    total = sum((getattr(loss, name) * term for name, term in terms.items()), jnp.float32(0))
    accuracy = contrastive.retrieval_accuracy(image, text, positives, weight)
    return total, {"loss": total, **{f"loss/{name}": term for name, term in terms.items()}, "batch_accuracy": accuracy}


def make_train_step(
    student: Encoders, teacher: Encoders | None, optimizer: optax.GradientTransformation, loss: LossConfig
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]:
    """The function (state, batch, teacher's parameters or None) -> (next state, metrics); float32 scalars."""

    def train_step(state: TrainState, batch: Batch, teacher_params: Any) -> tuple[TrainState, Metrics]:
        targets = None if teacher is None else jax.lax.stop_gradient(teacher(teacher_params, batch))
        gradients, metrics = jax.grad(objective, has_aux=True)(state.params, batch, student, targets, loss)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["clip"]["logit_scale"] = jnp.clip(params["clip"]["logit_scale"], 0, MAX_LOGIT_SCALE)
        metrics |= {
            "gradient_norm": optax.tree.norm(gradients),
            "logit_scale": jnp.exp(params["clip"]["logit_scale"]),
            "bad_samples": jnp.sum(batch["weight"] == 0).astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return train_step


def _project(head: dict[str, jax.Array], embedding: jax.Array) -> jax.Array:
    return normalize_embedding(embedding @ head["kernel"] + head["bias"])
