"""The sections of a configuration: every key once, with its type, default, unit and bounds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.prompts import get_templates
from tclip_jax.schema import MOST, check_keys, from_mapping, key


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = key(
        "digits", "digits, or folder:, tfds:, wds:, arrayrecord:, csv:, parquet:, mixture: ([data](data.md))"
    )
    split: str = key("train", "of the source")
    templates: str | tuple[str, ...] = key(
        "", "captions of class names: a name of prompts, or a list with {c}; empty: the data's own, or `simple`"
    )
    augment: str = key("none", f"one of {', '.join(AUGMENTATIONS)}")
    batch_size: int = key(128, "images over all devices", ge=1, le=MOST)
    microbatches: int = key(
        1, "parts of a batch that pass the towers one after the other; the loss is the whole batch's", ge=1, le=MOST
    )
    workers: int = key(0, "processes that prepare batches; 0: threads", ge=0, le=1024)
    max_bad_share: float = key(
        0.1, "of about the last 10,000 samples, or all of a shorter run: where more are bad, the run stops", ge=0, le=1
    )
    teacher_cache: str = key("", "folder of `tclip teacher-cache`, in place of a teacher in the step")

    def __post_init__(self) -> None:
        _as_tuples(self, "templates")
        check_keys([self.augment], AUGMENTATIONS, "config.data.augment")
        if self.templates:
            get_templates(self.templates)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; all but `task` need a teacher."""

    task: float = key(1.0, "weight: contrastive, between the student's images and texts", ge=0)
    task_kind: Literal["info_nce", "sigmoid"] = key("info_nce", "sigmoid: SigLIP's, with a learned bias from −10 on")
    crd: float = key(0.0, "weight: KL to the teacher's image-text similarities (CLIP-KD, arXiv 2307.12732)", ge=0)
    icl: float = key(0.0, "weight: contrastive, between student's and teacher's embeddings (CLIP-KD)", ge=0)
    fd: float = key(0.0, "weight: distance to the teacher's embeddings; 2000 in CLIP-KD, whose distance is mse", ge=0)
    fd_kind: Literal["mse", "cosine"] = key("mse", "the distance of fd")
    open_clip: float = key(0.0, "weight: open_clip's DistillClipLoss", ge=0)
    affinity: float = key(0.0, "weight: TinyCLIP's affinity mimicking", ge=0)
    kl: float = key(0.0, "weight: as crd, a mix of both directions", ge=0)
    kl_reverse: float = key(0.5, "share of KL(student ‖ teacher) in kl", ge=0, le=1)
    hidden: float = key(0.0, "weight: distance to the teacher's hidden states, by a learned projection", ge=0)
    hidden_kind: Literal["mse", "cosine"] = key("cosine", "the distance of hidden")
    relations: float = key(
        0.0, "weight: KL to the teacher's relations of queries, of keys and of values (MiniLM, BitDistill)", ge=0
    )
    relation_heads: int = key(8, "into which relations split the channels", ge=1, le=MOST)
    layers: tuple[int, ...] = key((-1,), "of the student, for hidden and relations; the teacher's at the same depth")
    towers: tuple[str, ...] = key(
        ("image", "text"), "whose layers; both models must have the same number of tokens there"
    )
    positives: Literal["diagonal", "equal_text"] = key("diagonal", "equal_text: equal captions are no negatives")
    distributed: Literal["gather", "ring"] = key(
        "gather", "every device holds all embeddings, or they visit it in turn"
    )
    ring_chunk: int = key(
        1024, "the most visiting embeddings that a device compares its own with at a time", ge=1, le=MOST
    )

    def __post_init__(self) -> None:
        _as_tuples(self, "layers", "towers")
        check_keys(self.towers, ("image", "text"), "config.loss.towers")
        if not (self.task or self.needs_teacher):
            raise ValueError("config.loss: all weights are 0, so nothing would be learned: give one of them")

    @property
    def states(self) -> tuple[str, ...]:
        """What must be seen inside the towers: hidden states, and fused queries, keys and values."""
        return (("hidden",) if self.hidden else ()) + (("qkv",) if self.relations else ())

    @property
    def sigmoid(self) -> bool:
        """Whether the student's logits have a bias."""
        return bool(self.task) and self.task_kind == "sigmoid"

    @property
    def projected(self) -> bool:
        """Whether a term with a weight compares the student's embeddings with the teacher's."""
        return bool(self.icl or self.fd)

    @property
    def affinities(self) -> bool:
        """Whether a term with a weight compares how similar student and teacher find an image and a text."""
        return bool(self.crd or self.open_clip or self.affinity or self.kl)

    @property
    def needs_teacher(self) -> tuple[str, ...]:
        """The terms with a weight that compare with a teacher."""
        terms = ("crd", "icl", "fd", "open_clip", "affinity", "kl", "hidden", "relations")
        return tuple(name for name in terms if getattr(self, name))


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """What an entry of `optimizer.groups` changes for the parameters that its regex matches."""

    learning_rate: float = key(1.0, "factor of the schedule", ge=0)
    weight_decay: float = key(0.0, "instead of the optimizer's", ge=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup, cosine decay and, if wanted, a recovery phase at a low learning rate."""

    learning_rate: float = key(1e-3, "the peak", gt=0)
    warmup_steps: int = key(0, "over which the learning rate grows from 0", ge=0, le=MOST)
    recovery_steps: int = key(0, "the last of all steps; the cosine ends where they begin (FTerViT)", ge=0, le=MOST)
    recovery_learning_rate: float = key(0.0, "where the cosine ends, and what is kept from then on", ge=0)
    weight_decay: float = key(0.1, "none for biases, LayerNorm, class embedding, logit scale and learned scales", ge=0)
    b1: float = key(0.9, "decay of the mean of gradients", ge=0, lt=1)
    b2: float = key(0.98, "decay of the mean of their squares", ge=0, lt=1)
    eps: float = key(1e-6, "added to the root of that mean", gt=0)
    clip_norm: float = key(0.0, "of the global gradient; 0: no clipping", ge=0)
    groups: tuple[tuple[str, dict[str, float]], ...] = key(
        (),
        '(regex, {"learning_rate": factor of the schedule, "weight_decay": instead of the above}) of whole paths'
        " like clip/image/blocks/mlp/fc1/kernel; the first that matches decides",
    )
    ema_decay: float = key(0.0, "of an average of the latent weights, evaluated beside them; 0: none", ge=0, lt=1)

    def __post_init__(self) -> None:
        _as_tuples(self, "groups")
        for pattern, changes in self.groups:
            from_mapping(GroupConfig, changes, f"config.optimizer.groups {pattern!r}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be −1, the rest."""

    data: int = key(-1, "devices that each have other rows and, but for fsdp, all parameters", ge=1, also=(-1,))
    fsdp: int = key(1, "devices that share the parameters, each with other rows", ge=1, also=(-1,))
    tensor: int = key(
        1,
        "devices that share the products of the same rows; must divide heads, and inputs into whole groups",
        ge=1,
        also=(-1,),
    )
    slices: int = key(
        -1, "of TPUs, or processes, between which data lies; −1: as many as the devices are of", ge=1, also=(-1,)
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Zero-shot evaluation during training and at its end; source "" for none."""

    source: str = key("", "as data.source, or with a suite the folder of the exports")
    suite: str = key("", "names of suites and data sets, as of `tclip evaluate --suite`")
    split: str = key("test", "of the source")
    templates: str | tuple[str, ...] = key("", "as of `config.data`")
    every: int = key(1000, "steps", ge=1, le=MOST)
    batch_size: int = key(128, "images over all devices", ge=1, le=MOST)
    name: str = key("", 'metrics are <name>/<metric>, of a suite <name>/<data set>/<metric>; of "" zero_shot_accuracy')

    def __post_init__(self) -> None:
        _as_tuples(self, "templates")
        if self.templates:
            get_templates(self.templates)


def _as_tuples(config: Any, *names: str) -> None:
    """JSON has lists."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            object.__setattr__(config, name, value)
