"""The loss of a batch: what student and teacher say of it, and the weighted sum of the terms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tclip_jax.data.images import normalize
from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.models.blending import blend_params
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import normalize_embedding
from tclip_jax.models.states import States, apply_with_states
from tclip_jax.training.sections import LossConfig

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Observed(NamedTuple):
    """Embeddings of images and of texts, the scale of their similarities, and what was seen inside the towers."""

    image: jax.Array
    text: jax.Array
    scale: jax.Array | float
    states: States


@dataclasses.dataclass(frozen=True)
class Encoders:
    """A model with the pixel statistics it was trained with: those of teacher and student may differ."""

    model: CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, params: Any, batch: Batch, loss: LossConfig | None = None) -> Observed:
        """What the model says of a batch's uint8 images and its tokens, and the states that `loss` compares."""
        pixels = normalize(batch["image"], self.mean, self.std)
        if loss is None or not loss.states:
            image, text, scale = self.model.apply({"params": params}, pixels, batch["tokens"])  # type: ignore[misc]
            return Observed(image, text, scale, {})
        given, states = apply_with_states(self.model, params, pixels, batch["tokens"], loss.towers, loss.states)
        return Observed(*given, states)


def cached_teacher(batch: Batch, scale: float) -> Observed:
    """The teacher of a batch that brings its embeddings."""
    return Observed(batch["teacher_image"].astype(jnp.float32), batch["teacher_text"].astype(jnp.float32), scale, {})


def objective(
    params: Any,
    batch: Batch,
    student: Encoders,
    teacher: Observed | None,
    loss: LossConfig,
    share: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of the loss terms that have a weight, and each; `teacher` is what it says of the batch.

    `share` is the part of ternary weights that is quantized, None for all.
    """
    clip = params["clip"] if share is None else blend_params(params["clip"], student.model.rules, share)
    ours = student(clip, batch, loss)
    weight, positives = batch["weight"], contrastive.positive_pairs(batch["tokens"], loss.positives)
    terms: Metrics = {}
    if loss.task and loss.task_kind == "sigmoid":
        bias = params["heads"]["sigmoid_bias"]
        terms["task"] = contrastive.sigmoid_loss(ours.image, ours.text, ours.scale, bias, positives, weight)
    elif loss.task:
        terms["task"] = contrastive.info_nce(ours.image, ours.text, ours.scale, positives, weight)
    if teacher is not None:
        heads = params["heads"]
        models = (*ours[:3], *teacher[:3], weight)
        to_image, to_text = _project(heads["image"], ours.image), _project(heads["text"], ours.text)
        if loss.crd:
            terms["crd"] = distillation.crd(*models)
        if loss.open_clip:
            terms["open_clip"] = distillation.open_clip_distillation(*models)
        if loss.affinity:
            terms["affinity"] = distillation.affinity_mimicking(*models)
        if loss.kl:
            terms["kl"] = distillation.kl_mix(*models, loss.kl_reverse)
        if loss.icl:
            pair = (to_image, to_text, teacher.image, teacher.text)
            terms["icl"] = distillation.icl(*pair, heads["icl_scale"], positives, weight)
        if loss.fd:
            distance = functools.partial(distillation.feature_distillation, kind=loss.fd_kind, weight=weight)
            terms["fd"] = distance(to_image, teacher.image) + distance(to_text, teacher.text)
        terms |= _inside(heads, batch, ours.states, teacher.states, loss)
    total = sum((getattr(loss, name) * term for name, term in terms.items()), jnp.float32(0))
    accuracy = contrastive.retrieval_accuracy(ours.image, ours.text, positives, weight)
    return total, {"loss": total, **{f"loss/{name}": term for name, term in terms.items()}, "batch_accuracy": accuracy}


def check_teacher(teacher: CLIPConfig, student: CLIPConfig, loss: LossConfig) -> None:
    """Raises ValueError for a teacher that cannot see the student's batches, or whose states cannot be compared."""
    ours, theirs = student.vision.image_size, teacher.vision.image_size
    if ours != theirs:
        sizes = f"{theirs}, the student's {ours}"
        raise ValueError(f"the teacher's image size is {sizes}: they see the same pixels, so both must be equal")
    ours_text, theirs_text = student.text, teacher.text
    if (ours_text.context_length, ours_text.vocab_size) != (theirs_text.context_length, theirs_text.vocab_size):
        raise ValueError(
            f"the teacher's texts have {theirs_text.context_length} of {theirs_text.vocab_size} tokens, the student's"
            f" {ours_text.context_length} of {ours_text.vocab_size}: they read the same tokens, so both must be equal"
        )
    if loss.states and "image" in loss.towers and student.vision.grid != teacher.vision.grid:
        raise ValueError(
            f"the teacher has a grid of {teacher.vision.grid} patches, the student of {student.vision.grid}: hidden"
            " states and relations compare token by token; leave config.loss.towers=('text',)"
        )


def same_depth(layer: int, depth: int, teacher_depth: int) -> int:
    """The teacher's layer at the relative depth of a student's layer; the last of one is the last of the other."""
    return -(-(layer % depth + 1) * teacher_depth // depth) - 1


def _inside(heads: Any, batch: Batch, student: States, teacher: States, loss: LossConfig) -> Metrics:
    """Hidden states and relations, each the mean over layers and towers (and over queries, keys and values)."""
    tokens = batch["tokens"]
    found: dict[str, list[jax.Array]] = {name: [] for name in ("hidden", "relations") if getattr(loss, name)}
    # What stands after the end of a text has no meaning.
    texts = jnp.arange(tokens.shape[1]) <= tokens.argmax(axis=-1, keepdims=True)
    for tower in student:
        ours, theirs = student[tower], teacher[tower]
        depth, teacher_depth = (len(next(iter(states.values()))) for states in (ours, theirs))
        for i, j in ((layer, same_depth(layer, depth, teacher_depth)) for layer in loss.layers):
            if loss.hidden:
                x, y = ours["hidden"][i], theirs["hidden"][j]
                valid = _valid(texts if tower == "text" else None, x, batch["weight"])
                projected = x.astype(jnp.float32) @ heads["hidden"][tower]["kernel"] + heads["hidden"][tower]["bias"]
                found["hidden"].append(hidden_matching(projected, y, loss.hidden_kind, valid))
            if loss.relations:
                x, y = ours["qkv"][i], theirs["qkv"][j]
                valid = _valid(texts if tower == "text" else None, x, batch["weight"])
                found["relations"] += [
                    relation_matching(a, b, loss.relation_heads, valid)
                    for a, b in zip(jnp.split(x, 3, axis=-1), jnp.split(y, 3, axis=-1), strict=True)
                ]
    return {name: sum(values, jnp.float32(0)) / len(values) for name, values in found.items()}


def _valid(texts: jax.Array | None, states: jax.Array, weight: jax.Array) -> jax.Array:
    real = jnp.broadcast_to((weight > 0)[:, None], states.shape[:2])
    return real if texts is None else real & texts


def _project(head: dict[str, jax.Array], embedding: jax.Array) -> jax.Array:
    return normalize_embedding(embedding @ head["kernel"] + head["bias"])
