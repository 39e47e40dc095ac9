"""The loss of a batch: what student and teacher say of it, and the weighted sum of the terms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tclip_jax.data.images import normalize
from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.ring import Ring
from tclip_jax.losses.rows import compare, compare_rows
from tclip_jax.models.blending import blend_params
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import normalize_embedding
from tclip_jax.models.states import States, apply_with_states
from tclip_jax.parallel.mesh import BATCH_AXES
from tclip_jax.training.inside import Batch, Metrics, compare_states
from tclip_jax.training.sections import LossConfig


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
