"""The sections of a configuration: every key with its default, unit and bounds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = "digits"  # digits, or folder:, tfds:, wds:, arrayrecord:, csv:, parquet:, mixture: as in docs/data.md
    split: str = "train"
    templates: str | tuple[str, ...] = "digits"  # captions of labelled data: a name of data.prompts, or a list with {c}
    augment: str = "none"  # none, affine, random_resized_crop, wide_crop, strong
    batch_size: int = 128  # images over all devices
    microbatches: int = 1  # parts of a batch that pass the towers one after the other; the loss is the whole batch's
    workers: int = 0  # processes that prepare batches; 0: threads
    max_bad_share: float = 0.1  # of about the last 10,000 samples: where more are bad, the run stops
    teacher_cache: str = ""  # folder of `tclip teacher-cache`, in place of a teacher in the step


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; all but `task` need a teacher."""

    task: float = 1.0  # contrastive, between the student's images and texts
    task_kind: Literal["info_nce", "sigmoid"] = "info_nce"  # sigmoid: SigLIP's, with a learned bias that starts at −10
    crd: float = 0.0  # KL to the teacher's image-text similarities (CLIP-KD, arXiv 2307.12732)
    icl: float = 0.0  # contrastive, between the student's and the teacher's embeddings (CLIP-KD)
    fd: float = 0.0  # distance to the teacher's embeddings; 2000 in CLIP-KD, whose distance is mse
    fd_kind: Literal["mse", "cosine"] = "mse"
    open_clip: float = 0.0  # open_clip's DistillClipLoss
    affinity: float = 0.0  # TinyCLIP's affinity mimicking
    kl: float = 0.0  # as crd, a mix of both directions
    kl_reverse: float = 0.5  # share of KL(student ‖ teacher) in it
    hidden: float = 0.0  # distance to the teacher's hidden states, by a learned projection
    hidden_kind: Literal["mse", "cosine"] = "cosine"
    relations: float = 0.0  # KL to the teacher's relations of queries, of keys and of values (MiniLM, BitDistill)
    relation_heads: int = 8
    layers: tuple[int, ...] = (-1,)  # of the student, for hidden and relations; the teacher's at the same depth
    towers: tuple[str, ...] = ("image", "text")  # whose layers; both models must have the same number of tokens there
    positives: Literal["diagonal", "equal_text"] = "diagonal"  # equal_text: equal captions are no negatives
    distributed: Literal["gather", "ring"] = "gather"  # every device holds all embeddings, or they visit it in turn
    ring_chunk: int = 1024  # the most visiting embeddings that a device compares its own with at a time

    def __post_init__(self) -> None:
        _as_tuples(self, "layers", "towers")
        if self.ring_chunk < 1:
            raise ValueError(f"config.loss.ring_chunk is {self.ring_chunk}: it must be at least 1")

    @property
    def states(self) -> tuple[str, ...]:
        """What must be seen inside the towers: hidden states, and fused queries, keys and values."""
        return (("hidden",) if self.hidden else ()) + (("qkv",) if self.relations else ())

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
class OptimizerConfig:
    """AdamW with linear warmup, cosine decay and, if wanted, a recovery phase at a low learning rate."""

    learning_rate: float = 1e-3  # the peak
    warmup_steps: int = 0
    recovery_steps: int = 0  # the last of all steps; the cosine ends where they begin (FTerViT)
    recovery_learning_rate: float = 0.0  # where the cosine ends, and what is kept from then on
    weight_decay: float = 0.1  # none for biases, LayerNorm, class embedding, logit scale and learned scales
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 0.0  # of the global gradient; 0: no clipping
    # (regex, {"learning_rate": factor of the schedule, "weight_decay": instead of the above}); the first that matches
    # a whole path like clip/image/blocks/mlp/fc1/kernel decides.
    groups: tuple[tuple[str, dict[str, float]], ...] = ()
    ema_decay: float = 0.0  # of an average of the latent weights, evaluated beside them; 0: none

    def __post_init__(self) -> None:
        _as_tuples(self, "groups")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be −1, the rest."""

    data: int = -1  # each has other rows and, but for fsdp, all parameters
    fsdp: int = 1  # share the parameters, each with other rows
    tensor: int = 1  # share the products of the same rows; must divide heads, and inputs into whole groups
    slices: int = -1  # of TPUs, or processes, between which data lies; −1: as many as the devices are of


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Zero-shot evaluation during training and at its end; source "" for none."""

    source: str = ""  # as data.source, or with a suite the folder of the exports
    suite: str = ""  # names of suites and data sets, as of `tclip evaluate --suite`
    split: str = "test"
    templates: str | tuple[str, ...] = "digits"
    every: int = 1000  # steps
    batch_size: int = 128
    name: str = ""  # metrics are <name>/<metric>, of a suite <name>/<data set>/<metric>; of "" zero_shot_accuracy


def _as_tuples(config: Any, *names: str) -> None:
    """JSON has lists."""
    for name in names:
        value = getattr(config, name)
        object.__setattr__(config, name, tuple(tuple(item) if isinstance(item, list) else item for item in value))
