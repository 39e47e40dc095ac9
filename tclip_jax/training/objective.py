"""The loss of a batch: both towers encode it, and the weighted terms of the loss are added up."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tclip_jax.data.images import normalize
from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.losses.ring import Ring
from tclip_jax.losses.statistics import compare, compare_rows
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import blend_params, normalize_embedding
from tclip_jax.models.states import States, apply_with_states
from tclip_jax.parallel.mesh import BATCH_AXES
from tclip_jax.runs.config import LossConfig


def init_heads(
    key: jax.Array, student: CLIPConfig, teacher: CLIPConfig | int | None, loss: LossConfig
) -> dict[str, Any]:
    """What the terms of the loss with a weight ask for, and nothing else: weight decay would shrink it.

    Args:
      key: for the projections.
      student: its shape.
      teacher: its shape, its embed_dim where only its embeddings are known, or None for none.
      loss: the terms.

    Returns:
      `image`, `text`: projections of embeddings to the teacher's width, for icl and fd; `icl_scale`: ICL's scale, which
      starts at 2.659; `hidden`: for each tower a projection of hidden states; `sigmoid_bias`: SigLIP's, from −10.
    """
    heads: dict[str, Any] = {}
    if loss.sigmoid:
        heads["sigmoid_bias"] = jnp.float32(-10)
    if teacher is None:
        return heads
    if loss.projected:
        width = teacher if isinstance(teacher, int) else teacher.embed_dim
        for name, each in zip(("image", "text"), jax.random.split(key), strict=True):
            heads[name] = _linear(each, student.embed_dim, width)
    if loss.icl:
        heads["icl_scale"] = jnp.float32(2.659)
    if loss.hidden and not isinstance(teacher, int):
        widths = {
            "image": (student.vision.width, teacher.vision.width),
            "text": (student.text.width, teacher.text.width),
        }
        keys = jax.random.split(jax.random.fold_in(key, 2))
        heads["hidden"] = {
            tower: _linear(each, *widths[tower])
            for tower, each in zip(("image", "text"), keys, strict=True)
            if tower in loss.towers
        }
    return heads


def _linear(key: jax.Array, width: int, to_width: int) -> dict[str, jax.Array]:
    bound = width**-0.5
    kernel = jax.random.uniform(key, (width, to_width), minval=-bound, maxval=bound)
    return {"kernel": kernel, "bias": jnp.zeros(to_width)}


Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def same_depth(layer: int, depth: int, teacher_depth: int) -> int:
    """The teacher's layer at the relative depth of a student's layer; the last of one is the last of the other."""
    return -(-(layer % depth + 1) * teacher_depth // depth) - 1


def valid_tokens(batch: Batch) -> dict[str, jax.Array]:
    """Of each tower, which tokens count: bool (B, T) of texts, (B, 1) of images, whose tokens all do or none."""
    tokens, real = batch["tokens"], (batch["weight"] > 0)[:, None]
    # What stands after the end of a text has no meaning.
    return {"image": real, "text": real & (jnp.arange(tokens.shape[1]) <= tokens.argmax(axis=-1, keepdims=True))}


def compare_states(
    heads: Any, batch: Batch, student: States, teacher: States, loss: LossConfig, whole: Batch
) -> Metrics:
    """Hidden states and relations, each the mean over layers and towers (and over queries, keys and values).

    `batch` may be some rows of `whole`, of which `tokens` and `weight` are read: the results of its parts add up.
    """
    found: dict[str, list[jax.Array]] = {name: [] for name in ("hidden", "relations") if getattr(loss, name)}
    for tower in student:
        ours, theirs = student[tower], teacher[tower]
        valid, all_valid = valid_tokens(batch)[tower], valid_tokens(whole)[tower]
        part = jnp.sum(valid) / jnp.maximum(jnp.sum(all_valid), 1)
        depth, teacher_depth = (len(next(iter(states.values()))) for states in (ours, theirs))
        for i, j in ((layer, same_depth(layer, depth, teacher_depth)) for layer in loss.layers):
            if loss.hidden:
                x, y = ours["hidden"][i], theirs["hidden"][j]
                projected = x.astype(jnp.float32) @ heads["hidden"][tower]["kernel"] + heads["hidden"][tower]["bias"]
                of = jnp.broadcast_to(valid, x.shape[:2])
                found["hidden"].append(part * hidden_matching(projected, y, loss.hidden_kind, of))
            if loss.relations:
                x, y = ours["qkv"][i], theirs["qkv"][j]
                of = jnp.broadcast_to(valid, x.shape[:2])
                found["relations"] += [
                    part * relation_matching(a, b, loss.relation_heads, of)
                    for a, b in zip(jnp.split(x, 3, axis=-1), jnp.split(y, 3, axis=-1), strict=True)
                ]
    return {name: sum(values, jnp.float32(0)) / len(values) for name, values in found.items()}


@dataclasses.dataclass(frozen=True)
class Encoders:
    """A model with the pixel statistics it was trained with: those of teacher and student may differ."""

    model: CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, params: Any, batch: Batch, loss: LossConfig | None = None
    ) -> tuple[jax.Array, jax.Array, States]:
        """Embeddings of a batch's uint8 images and of its tokens, and the states that `loss` compares."""
        pixels = normalize(batch["image"], self.mean, self.std)
        if loss is None or not loss.states:
            image, text, _ = self.model.apply({"params": params}, pixels, batch["tokens"])  # type: ignore[misc]
            return image, text, {}
        (image, text, _), states = apply_with_states(
            self.model, params, pixels, batch["tokens"], loss.towers, loss.states
        )
        return image, text, states


class Seen(NamedTuple):
    """Embeddings (B, D) of a batch's images and texts, and a teacher's of both where there is one."""

    image: jax.Array
    text: jax.Array
    teacher: tuple[jax.Array, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a student is trained for.

    `see` is what the towers do, to any rows of a batch; `judge` makes a loss of what was seen of all of them.

    Attributes:
      student: the model that is trained.
      teacher: runs beside it; or is the scale of one whose embeddings come with the batch; or None.
      loss: weights of the terms.
    """

    student: Encoders
    teacher: Encoders | float | None
    loss: LossConfig

    def see(
        self, params: Any, teacher_params: Any, batch: Batch, whole: Batch, share: jax.Array | None = None
    ) -> tuple[Seen, Metrics]:
        """Embeddings, and the terms that look inside the towers: of parts of a batch these add up to the whole's.

        Args:
          batch: some rows of `whole`, or all.
          share: the part of ternary weights that is quantized, None for all.
        """
        clip = params["clip"] if share is None else blend_params(params["clip"], self.student.model.rules, share)
        image, text, states = self.student(clip, batch, self.loss)
        if self.teacher is None:
            return Seen(image, text), {}
        if not isinstance(self.teacher, Encoders):
            cached = batch["teacher_image"].astype(jnp.float32), batch["teacher_text"].astype(jnp.float32)
            return Seen(image, text, cached), {}
        their_image, their_text, their_states = jax.lax.stop_gradient(self.teacher(teacher_params, batch, self.loss))
        inside = compare_states(params.get("heads", {}), batch, states, their_states, self.loss, whole)
        return Seen(image, text, (their_image, their_text)), inside

    def judge(
        self, params: Any, teacher_params: Any, batch: Batch, seen: Seen, inside: Metrics
    ) -> tuple[jax.Array, Metrics]:
        """The weighted sum of the loss terms that have a weight, and each."""
        loss, heads, terms = self.loss, params.get("heads", {}), dict(inside)
        how: dict[str, Any] = {
            "tokens": batch["tokens"] if loss.positives == "equal_text" else None,
            "weight": batch["weight"],
            "ring": Ring(BATCH_AXES, loss.ring_chunk) if loss.distributed == "ring" else None,
        }
        teacher, bias = None, heads["sigmoid_bias"] if loss.sigmoid else None
        if self.teacher is not None and seen.teacher is not None and loss.affinities:
            teacher = *seen.teacher, _scale(teacher_params) if isinstance(self.teacher, Encoders) else self.teacher
        rows = compare(seen.image, seen.text, _scale(params["clip"]), teacher=teacher, bias=bias, **how)
        if loss.task:
            terms["task"] = contrastive.sigmoid_loss(rows[0]) if bias is not None else contrastive.info_nce(*rows)
        if seen.teacher is not None:
            their_image, their_text = seen.teacher
            if loss.projected:
                to_image, to_text = _project(heads["image"], seen.image), _project(heads["text"], seen.text)
            if loss.crd:
                terms["crd"] = distillation.crd(*rows)
            if loss.open_clip:
                terms["open_clip"] = distillation.open_clip_distillation(*rows)
            if loss.affinity:
                terms["affinity"] = distillation.affinity_mimicking(*rows)
            if loss.kl:
                terms["kl"] = distillation.kl_mix(*rows, loss.kl_reverse)
            if loss.icl:
                terms["icl"] = contrastive.info_nce(
                    compare_rows(to_image, their_text, heads["icl_scale"], **how),
                    compare_rows(to_text, their_image, heads["icl_scale"], **how),
                )
            if loss.fd:
                distance = functools.partial(
                    distillation.feature_distillation, kind=loss.fd_kind, weight=batch["weight"]
                )
                terms["fd"] = distance(to_image, their_image) + distance(to_text, their_text)
        total = sum((getattr(loss, name) * term for name, term in terms.items()), jnp.float32(0))
        metrics = {"loss": total, **{f"loss/{name}": term for name, term in terms.items()}}
        return total, metrics | {"batch_accuracy": contrastive.retrieval_accuracy(rows[0])}


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
    for name, model in (("student", student), ("teacher", teacher)):
        for tower, width in (("image", model.vision.width), ("text", model.text.width)):
            if loss.relations and tower in loss.towers and width % loss.relation_heads:
                raise ValueError(
                    f"config.loss.relation_heads is {loss.relation_heads}: it must divide {width}, the width of the"
                    f" {name}'s {tower} tower"
                )


def _scale(params: Any) -> jax.Array:
    return jnp.exp(params["logit_scale"])


def _project(head: dict[str, jax.Array], embedding: jax.Array) -> jax.Array:
    return normalize_embedding(embedding @ head["kernel"] + head["bias"])
