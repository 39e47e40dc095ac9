"""What a run is: every key with its default, unit and bounds; a ConfigDict for people, frozen dataclasses inside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import ml_collections

from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg, preprocess_cfg
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.schema import check_keys, from_mapping
from tclip_jax.ternary import Quantizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    source: str = "digits"  # digits, folder:<path>, tfds:<name>[@<data_dir>]
    split: str = "train"
    templates: str | tuple[str, ...] = "digits"  # captions of labelled data: a name of data.prompts, or a list with {c}
    augment: str = "none"  # none, affine, random_resized_crop
    batch_size: int = 128  # images over all devices
    workers: int = 0  # processes that prepare batches; 0: threads


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the terms of the loss; all but `task` need a teacher (CLIP-KD, arXiv 2307.12732)."""

    task: float = 1.0  # contrastive, between the student's images and texts
    crd: float = 0.0  # KL to the teacher's image-text similarities
    icl: float = 0.0  # contrastive, between the student's and the teacher's embeddings
    fd: float = 0.0  # distance to the teacher's embeddings; 2000 in CLIP-KD, whose distance is mse
    fd_kind: Literal["mse", "cosine"] = "mse"
    positives: Literal["diagonal", "equal_text"] = "diagonal"  # equal_text: equal captions are no negatives


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and cosine decay to 0."""

    learning_rate: float = 1e-3  # the peak
    warmup_steps: int = 0
    weight_decay: float = 0.1  # none for biases, LayerNorm, class embedding and logit scale
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 0.0  # of the global gradient; 0: no clipping


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be −1, the rest."""

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state and the data iterator are saved (always at the end), and how many are kept."""

    every: int = 1000  # steps
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Zero-shot evaluation during training and at its end; source "" for none."""

    source: str = ""  # as data.source, or with a suite the folder of the exports
    suite: str = ""  # names of suites and data sets, as of `tclip evaluate --suite`
    split: str = "test"
    templates: str | tuple[str, ...] = "digits"
    every: int = 1000  # steps
    batch_size: int = 128
    name: str = ""  # metrics are <name>/<data set>/<metric>; of "" zero_shot_accuracy alone


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run, checked."""

    seed: int
    steps: int
    model: CLIPConfig
    preprocess: Preprocess
    rules: TernaryRules
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    teacher: str
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    evals: tuple[EvalConfig, ...]


_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "loss": LossConfig,
    "optimizer": OptimizerConfig,
    "mesh": MeshConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
}


def base_config() -> ml_collections.ConfigDict:
    """Every key at its default: what recipes start from."""
    sections = {name: dataclasses.asdict(cls()) for name, cls in _SECTIONS.items()}
    return ml_collections.ConfigDict(
        {
            "seed": 0,  # of parameters, shuffling and augmentation
            "steps": 1000,
            "model": model_cfg("tiny"),  # open_clip's model_cfg
            "preprocess": preprocess_cfg(),  # open_clip's preprocess_cfg
            "ternary": "none",  # none, Q-FFN, Q-ALL, or a list of (regex, {keys of quantizer that differ})
            "quantizer": dataclasses.asdict(Quantizer()),
            "dtype": "float32",  # of the computation: float32 or bfloat16; parameters stay float32
            "remat": False,  # recompute blocks in the backward pass to save memory
            "teacher": "",  # a run's workdir or an artifact; "": none
            "evals": (),  # further evaluations: mappings with keys of eval, and each with a name
            **sections,
        },
        # A tuple or None may be put where a string stands: types are checked in `run_config`, with clearer errors.
        type_safe=False,
    )


def run_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Checks a configuration whole and converts it.

    Raises:
      ValueError: an unknown key, with the nearest valid name; a wrong type; values that contradict each other.
    """
    given = config.to_dict()
    check_keys(given, base_config(), "config")
    values = base_config().to_dict() | given
    sections: dict[str, Any] = {
        name: from_mapping(cls, values[name], f"config.{name}") for name, cls in _SECTIONS.items()
    }
    model = CLIPConfig.from_open_clip(values["model"])
    quantizer = from_mapping(Quantizer, values["quantizer"], "config.quantizer")
    run = from_mapping(
        RunConfig,
        {
            **{key: values[key] for key in ("seed", "steps", "dtype", "remat", "teacher")},
            "model": model,
            "preprocess": Preprocess.from_open_clip(values["preprocess"], model.vision.image_size),
            "rules": ternary_rules(_rules(values["ternary"], values["quantizer"]), quantizer),
            **sections,
            "evals": tuple(
                from_mapping(EvalConfig, each, f"config.evals[{i}]") for i, each in enumerate(values["evals"])
            ),
        },
        "config",
    )
    _check_values(run)
    return run


def _rules(given: Any, quantizer: dict[str, Any]) -> str | Sequence[tuple[str, Quantizer]]:
    if isinstance(given, str):
        return given
    if not all(isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in given):
        raise ValueError(f"config.ternary is {given!r}: it must be a name, or a list of (regex, {{changed keys}})")
    return [
        (pattern, from_mapping(Quantizer, {**quantizer, **changes}, f"config.ternary {pattern!r}"))
        for pattern, changes in given
    ]


def _check_values(run: RunConfig) -> None:
    for name, value in (
        ("steps", run.steps),
        ("data.batch_size", run.data.batch_size),
        ("checkpoint.every", run.checkpoint.every),
        ("checkpoint.keep", run.checkpoint.keep),
        ("eval.every", run.eval.every),
        ("eval.batch_size", run.eval.batch_size),
        *((f"evals[{i}].every", each.every) for i, each in enumerate(run.evals)),
        *((f"evals[{i}].batch_size", each.batch_size) for i, each in enumerate(run.evals)),
    ):
        if value < 1:
            raise ValueError(f"config.{name} is {value}: it must be at least 1")
    names = [each.name for each in run.evals]
    if len({*names, ""}) <= len(names):
        raise ValueError(f"config.evals have the names {names}: each must have one of its own")
    if not all(each.source for each in run.evals):
        raise ValueError("config.evals: each must have a source")
    if not math.isfinite(run.optimizer.learning_rate) or run.optimizer.learning_rate <= 0:
        raise ValueError(f"config.optimizer.learning_rate is {run.optimizer.learning_rate}: it must be above 0")
    if not 0 <= run.optimizer.warmup_steps < run.steps:
        raise ValueError(
            f"config.optimizer.warmup_steps {run.optimizer.warmup_steps} is not below config.steps {run.steps}"
        )
    if run.preprocess.size != run.model.vision.image_size:
        raise ValueError(
            f"config.preprocess.size {run.preprocess.size} is not the model's image size {run.model.vision.image_size}"
        )
    needs_teacher = [name for name in ("crd", "icl", "fd") if getattr(run.loss, name)]
    if needs_teacher and not run.teacher:
        raise ValueError(
            f"config.loss.{needs_teacher[0]} needs a teacher: set config.teacher to a workdir or an artifact"
        )
