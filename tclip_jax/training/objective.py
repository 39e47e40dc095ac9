"""The objective: encode a batch with both models, and add up the weighted losses of the registry."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tclip_jax.data.images import normalize
from tclip_jax.losses.contrastive import accuracy_of_rows
from tclip_jax.losses.exchange import Exchange, Gather, Ring
from tclip_jax.losses.registry import LOSSES, Inputs, LayerInputs, Need
from tclip_jax.losses.statistics import compare, compare_rows
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import QUANTIZER_RNG, Softness, blend_params, normalize_embedding
from tclip_jax.models.taps import States, apply_with_states
from tclip_jax.parallel.mesh import BATCH_AXES, mesh_in_force
from tclip_jax.runs.config import LossConfig


def init_heads(
    key: jax.Array, student: CLIPConfig, teacher: CLIPConfig | int | None, loss: LossConfig
) -> dict[str, Any]:
    """Return the learned parameters of the losses whose weight is not 0; weight decay would shrink any others.

    Args:
      key: PRNG key of the projections.
      student: the student's configuration.
      teacher: the teacher's configuration, its embed_dim if only its embeddings are known, or None.
      loss: weights and options of the losses.

    Returns:
      `image` and `text`: projections of embeddings to the teacher's width, for icl and fd. `icl_scale`: ICL's logit
      scale, initially 2.659. `hidden`: a projection of hidden states for each tower. `sigmoid_bias`: the bias of
      SigLIP's loss, initially −10, unless the model has one. `<name>`: the head of a plug-in's loss.
    """
    heads: dict[str, Any] = {}
    if loss.sigmoid and student.init_logit_bias is None:
        heads["sigmoid_bias"] = jnp.float32(-10)
    width = teacher.embed_dim if isinstance(teacher, CLIPConfig) else teacher
    for name in loss.weights:
        if init_head := LOSSES[name].init_head:  # its key depends on its name alone, not on the other losses
            heads[name] = init_head(jax.random.fold_in(key, zlib.crc32(name.encode())), student.embed_dim, width)
    if teacher is None or width is None:
        return heads
    if loss.needs("projection"):
        for name, each in zip(("image", "text"), jax.random.split(key), strict=True):
            heads[name] = _linear(each, student.embed_dim, width)
    if "icl" in loss.weights:
        heads["icl_scale"] = jnp.float32(2.659)
    if "hidden" in loss.weights and not isinstance(teacher, int):
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
    """Return the teacher's layer at the relative depth of a student's layer; the last layer maps to the last."""
    return -(-(layer % depth + 1) * teacher_depth // depth) - 1


def valid_tokens(batch: Batch) -> dict[str, jax.Array]:
    """Return the mask of valid tokens for each tower: bool (B, T) for texts, (B, 1) for images."""
    tokens, mask = batch["tokens"], (batch["weight"] > 0)[:, None]
    # Tokens after the end of a text are padding.
    return {"image": mask, "text": mask & (jnp.arange(tokens.shape[1]) <= tokens.argmax(axis=-1, keepdims=True))}


@jax.named_scope("losses")
def layer_losses(heads: Any, batch: Batch, student: States, teacher: States, loss: LossConfig, whole: Batch) -> Metrics:
    """Return the losses of hidden states and relations, each the mean over layers and towers.

    Args:
      heads: learned parameters, see `init_heads`.
      batch: some rows of `whole`, or all; the losses of disjoint parts add up to the loss of the whole.
      student: the student's states, by tower and kind.
      teacher: the teacher's states.
      loss: weights and options of the losses.
      whole: the batch; only `tokens` and `weight` are read.
    """
    kinds: dict[str, Need] = {name: LOSSES[name].needs[0] for name in loss.weights if LOSSES[name].of_layers}
    values: dict[str, list[jax.Array]] = {name: [] for name in kinds}
    for tower in student:
        ours, theirs = student[tower], teacher[tower]
        mask, whole_mask = valid_tokens(batch)[tower], valid_tokens(whole)[tower]
        share = jnp.sum(mask) / jnp.maximum(jnp.sum(whole_mask), 1)
        depth, teacher_depth = (len(next(iter(states.values()))) for states in (ours, theirs))
        for i, j in ((layer, same_depth(layer, depth, teacher_depth)) for layer in loss.layers):
            for name, kind in kinds.items():
                x, y = ours[kind][i], theirs[kind][j]
                head = heads["hidden"][tower] if kind == "hidden" else None
                inputs = LayerInputs(x, y, jnp.broadcast_to(mask, x.shape[:2]), loss, head)
                with jax.named_scope(name):
                    values[name] += [share * value for value in LOSSES[name].function(inputs)]
    return {name: sum(each, jnp.float32(0)) / len(each) for name, each in values.items()}


@dataclasses.dataclass(frozen=True)
class Encoders:
    """A model and its pixel mean and standard deviation, which may differ between student and teacher."""

    model: CLIP
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, params: Any, batch: Batch, loss: LossConfig | None = None, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, States]:
        """Return the embeddings (B, D) of a batch's uint8 images and tokens, and the states that `loss` compares.

        `key` is the PRNG key of quantizers that draw random numbers; None makes them deterministic.
        """
        pixels, rngs = normalize(batch["image"], self.mean, self.std), None if key is None else {QUANTIZER_RNG: key}
        if loss is None or not loss.states:
            image, text, _ = self.model.apply({"params": params}, pixels, batch["tokens"], rngs=rngs)  # type: ignore[misc]
            return image, text, {}
        (image, text, _), states = apply_with_states(
            self.model, params, pixels, batch["tokens"], loss.towers, loss.states, rngs
        )
        return image, text, states


class Embeddings(NamedTuple):
    """The student's embeddings (B, D) of images and texts, and those of the teacher if there is one."""

    image: jax.Array
    text: jax.Array
    teacher: tuple[jax.Array, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """The objective in two parts, as gradient caching needs them: `encode` for parts of a batch, `loss` for the whole.

    Attributes:
      student: the model that is trained.
      teacher: the teacher's model if it runs in the step, its logit scale if batches hold its embeddings, or None.
      config: weights and options of the losses.
    """

    student: Encoders
    teacher: Encoders | float | None
    config: LossConfig

    def encode(
        self,
        params: Any,
        teacher_params: Any,
        batch: Batch,
        whole: Batch,
        softness: Softness | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Embeddings, Metrics]:
        """Return the embeddings of some rows, and their part of the losses of hidden states.

        Args:
          params: the student's parameters `clip`, and `heads`.
          teacher_params: the teacher's parameters if it runs in the step, otherwise None.
          batch: some rows of `whole`, or all.
          whole: the batch.
          softness: how far weights are from ternary; None for hard trits.
          key: PRNG key of the student's quantizers that draw random numbers.
        """
        clip = params["clip"]
        if softness is not None:
            clip = blend_params(clip, self.student.model.rules, softness)
        with jax.named_scope("student"):
            image, text, states = self.student(clip, batch, self.config, key)
        if self.teacher is None:
            return Embeddings(image, text), {}
        if not isinstance(self.teacher, Encoders):
            cached = batch["teacher_image"].astype(jnp.float32), batch["teacher_text"].astype(jnp.float32)
            return Embeddings(image, text, cached), {}
        with jax.named_scope("teacher"):
            theirs = jax.lax.stop_gradient(self.teacher(teacher_params, batch, self.config))
        their_image, their_text, their_states = theirs
        of_layers = layer_losses(params.get("heads", {}), batch, states, their_states, self.config, whole)
        return Embeddings(image, text, (their_image, their_text)), of_layers

    @property
    def _exchange(self) -> Exchange:
        """How devices get the embeddings of others."""
        if mesh_in_force() is None:
            return None
        return Ring(BATCH_AXES, self.config.ring_chunk) if self.config.distributed == "ring" else Gather(BATCH_AXES)

    @jax.named_scope("losses")
    def loss(
        self, params: Any, teacher_params: Any, batch: Batch, embeddings: Embeddings, of_layers: Metrics
    ) -> tuple[jax.Array, Metrics]:
        """Return the weighted sum of the losses, and the metrics: each loss unweighted, and `batch_accuracy`.

        Args:
          params: the student's parameters `clip`, and `heads`.
          teacher_params: the teacher's parameters if it runs in the step, otherwise None.
          batch: the whole batch.
          embeddings: embeddings of the whole batch.
          of_layers: the losses of hidden states, see `layer_losses`.
        """
        image, text, teacher = embeddings
        config, heads, losses = self.config, params.get("heads", {}), dict(of_layers)
        masks: dict[str, Any] = {
            "tokens": batch["tokens"] if config.positives == "equal_text" else None,
            "weight": batch["weight"],
            "exchange": self._exchange,
        }
        affinities = their_scale = None
        if self.teacher is not None and teacher is not None:
            their_scale = _scale(teacher_params) if isinstance(self.teacher, Encoders) else self.teacher
            affinities = (*teacher, their_scale) if config.needs("affinities") else None
        bias = (params["clip"].get("logit_bias", heads.get("sigmoid_bias"))) if config.sigmoid else None
        rows = compare(image, text, _scale(params["clip"]), teacher=affinities, bias=bias, **masks)
        projected = None
        if teacher is not None and config.needs("projection"):
            projected = _project(heads["image"], image), _project(heads["text"], text)
        compared = functools.partial(compare_rows, **masks)
        inputs = Inputs(rows, (image, text), batch["weight"], config, heads, compared, projected, teacher, their_scale)
        for name in config.weights:
            if not LOSSES[name].of_layers and (teacher is not None or not LOSSES[name].needs):
                with jax.named_scope(name):
                    losses[name] = LOSSES[name].function(inputs)
                if jnp.shape(losses[name]):
                    raise ValueError(f"the loss {name} returns an array {losses[name].shape}: it must be a scalar")
        total = sum((config.weights[name] * value for name, value in losses.items()), jnp.float32(0))
        metrics = {"loss": total, **{f"loss/{name}": value for name, value in losses.items()}}
        return total, metrics | {"batch_accuracy": accuracy_of_rows(rows[0])}


def check_teacher(teacher: CLIPConfig, student: CLIPConfig, loss: LossConfig) -> None:
    """Raise ValueError if the teacher cannot encode the student's batches, or their states cannot be compared."""
    ours, theirs = student.vision.image_size, teacher.vision.image_size
    if ours != theirs:
        sizes = f"{theirs}, the student's {ours}"
        raise ValueError(f"the teacher's image size is {sizes}: they encode the same pixels, so both must be equal")
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
            if "relations" in loss.weights and tower in loss.towers and width % loss.relation_heads:
                raise ValueError(
                    f"config.loss.relation_heads is {loss.relation_heads}: it must divide {width}, the width of the"
                    f" {name}'s {tower} tower"
                )


def _scale(params: Any) -> jax.Array:
    return jnp.exp(params["logit_scale"])


def _project(head: dict[str, jax.Array], embedding: jax.Array) -> jax.Array:
    return normalize_embedding(embedding @ head["kernel"] + head["bias"])
