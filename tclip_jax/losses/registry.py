"""The registry of losses: for each name the function and the inputs that it needs.

`config.loss.<name>` is the weight of a loss. The inputs that it needs are computed only if the weight is not 0.
Plug-ins add losses by `tclip_jax.plugins.loss`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tclip_jax.losses.contrastive import info_nce_of_rows, sigmoid_of_rows
from tclip_jax.losses.distillation import (
    affinity_of_rows,
    agreement_rows,
    crd_of_rows,
    feature_distillation,
    kl_mix_of_rows,
    open_clip_of_rows,
)
from tclip_jax.losses.features import hidden_matching, relation_matching
from tclip_jax.losses.statistics import RowStats
from tclip_jax.registry import Registry

Need = Literal["affinities", "embeddings", "projection", "hidden", "qkv"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of the losses of embeddings.

    Attributes:
      rows: statistics of image → text and of text → image, with those of the teacher for losses that need affinities.
      student: the student's image and text embeddings (B, D).
      weight: (B,), 0 for a masked sample.
      options: `config.loss`; its keys other than the weights are options of the losses.
      heads: learned parameters of the losses; those of a loss with `init_head` are at its name.
      compare: `statistics.compare_rows` with the masks of the batch and the exchange of the devices.
      projected: the student's image and text embeddings (B, D'), projected to the teacher's width, for losses that need
        them.
      teacher: the teacher's image and text embeddings (B, D'), or None without a teacher.
      teacher_scale: the teacher's exp(logit_scale), or None without a teacher.
    """

    rows: tuple[RowStats, RowStats]
    student: tuple[jax.Array, jax.Array]
    weight: jax.Array
    options: Any
    heads: Mapping[str, Any]
    compare: Callable[..., RowStats]
    projected: tuple[jax.Array, jax.Array] | None = None
    teacher: tuple[jax.Array, jax.Array] | None = None
    teacher_scale: ArrayLike | None = None


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Inputs of the losses of hidden states, for one layer of one tower.

    Attributes:
      student: states of the student's layer (B, T, D): the residual stream after it, or its queries, keys and values
        concatenated along the last axis.
      teacher: the same of the teacher's layer at the same relative depth, (B, T, D').
      valid: bool (B, T), the tokens that count.
      options: `config.loss`.
      head: the learned projection of this tower for "hidden", or None.
    """

    student: jax.Array
    teacher: jax.Array
    valid: jax.Array
    options: Any
    head: Mapping[str, jax.Array] | None


@dataclasses.dataclass(frozen=True)
class Loss:
    """An entry of the registry.

    Attributes:
      function: `Inputs` to a float32 scalar. The function of a loss that needs "hidden" or "qkv" maps `LayerInputs` to
        a list of scalars, which are averaged over layers and towers.
      doc: description for the configuration reference.
      needs: inputs from a teacher: "affinities" are its image-text similarities, "embeddings" its embeddings,
        "projection" its embeddings and the student's projected to its width, "hidden" its hidden states, "qkv" its
        queries, keys and values.
      default: default weight.
      init_head: (PRNG key, width of the student's embeddings, width of the teacher's embeddings or None) -> learned
        parameters of the loss, a pytree of float32 arrays, which it finds in `Inputs.heads[name]`. None: it has none.
    """

    function: Callable[[Any], Any]
    doc: str
    needs: tuple[Need, ...] = ()
    default: float = 0.0
    init_head: Callable[[jax.Array, int, int | None], Any] | None = None

    @property
    def of_layers(self) -> bool:
        """Whether the loss compares hidden states of the towers."""
        return bool({"hidden", "qkv"} & {*self.needs})


def _task(x: Inputs) -> jax.Array:
    return sigmoid_of_rows(x.rows[0]) if x.options.sigmoid else info_nce_of_rows(*x.rows)


def _icl(x: Inputs) -> jax.Array:
    (image, text), (their_image, their_text) = _both(x)
    scale = x.heads["icl_scale"]
    return info_nce_of_rows(x.compare(image, their_text, scale), x.compare(text, their_image, scale))


def _fd(x: Inputs) -> jax.Array:
    distances = [feature_distillation(*pair, x.options.fd_kind, x.weight) for pair in zip(*_both(x), strict=True)]
    return distances[0] + distances[1]


def _relational(x: Inputs, *, cross: bool) -> jax.Array:
    (image, text), (their_image, their_text) = _both(x)
    if cross:
        their_image, their_text = their_text, their_image
    pairs = (image, their_image), (text, their_text)
    return crd_of_rows(*agreement_rows(*pairs, x.teacher_scale, x.compare))


def _both(x: Inputs) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    assert x.projected is not None and x.teacher is not None, "the loss does not declare that it needs a projection"
    return x.projected, x.teacher


def _hidden(x: LayerInputs) -> list[jax.Array]:
    assert x.head is not None
    projected = x.student.astype(jnp.float32) @ x.head["kernel"] + x.head["bias"]
    return [hidden_matching(projected, x.teacher, x.options.hidden_kind, x.valid)]


def _relations(x: LayerInputs) -> list[jax.Array]:
    pairs = zip(jnp.split(x.student, 3, axis=-1), jnp.split(x.teacher, 3, axis=-1), strict=True)
    return [relation_matching(ours, theirs, x.options.relation_heads, x.valid) for ours, theirs in pairs]


LOSSES: Registry[Loss] = Registry(
    "loss",
    {
        "hidden": Loss(_hidden, "distance to the teacher's hidden states, by a learned projection", ("hidden",)),
        "relations": Loss(
            _relations, "KL to the teacher's relations of queries, of keys and of values (MiniLM, BitDistill)", ("qkv",)
        ),
        "task": Loss(_task, "contrastive, between the student's images and texts", default=1.0),
        "crd": Loss(
            lambda x: crd_of_rows(*x.rows),
            "KL to the teacher's image-text similarities (CLIP-KD, arXiv 2307.12732)",
            ("affinities",),
        ),
        "open_clip": Loss(lambda x: open_clip_of_rows(*x.rows), "open_clip's DistillClipLoss", ("affinities",)),
        "affinity": Loss(lambda x: affinity_of_rows(*x.rows), "TinyCLIP's affinity mimicking", ("affinities",)),
        "kl": Loss(
            lambda x: kl_mix_of_rows(x.rows[0], x.rows[1], x.options.kl_reverse),
            "as crd, mixed with the reverse KL (kl_reverse)",
            ("affinities",),
        ),
        "icl": Loss(_icl, "contrastive, between student's and teacher's embeddings (CLIP-KD)", ("projection",)),
        "fd": Loss(
            _fd,
            "distance to the teacher's embeddings; 2000 in CLIP-KD, whose distance is mse",
            ("projection",),
        ),
        "vrd": Loss(
            functools.partial(_relational, cross=False),
            "agreement of student-teacher similarities among images with those among texts (CLIP-RD, arXiv 2603.25383)",
            ("projection",),
        ),
        "xrd": Loss(
            functools.partial(_relational, cross=True),
            "agreement of student images to teacher texts with student texts to teacher images (CLIP-RD)",
            ("projection",),
        ),
    },
)
