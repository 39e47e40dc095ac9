"""What a run is: every key with its default, unit and bounds; a ConfigDict for people, frozen dataclasses inside."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import ml_collections

from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg, preprocess_cfg
from tclip_jax.models.tensor_parallel import check_tensor
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.runs.policy import CheckpointConfig
from tclip_jax.schema import check_keys, from_mapping
from tclip_jax.ternary import Quantizer
from tclip_jax.training.sections import (
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
)


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
    init: str
    init_scales: Literal["keep", "recompute"]
    teacher: str
    inherit: str
    ternary_warmup_steps: int
    telemetry_every: int
    log_every: int
    max_skipped_steps: int
    stall_minutes: float
    stall_exit: bool
    compile_cache: str
    profile_steps: tuple[int, ...]
    wandb_project: str
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

_MADE = ("model", "preprocess", "rules", "evals", *_SECTIONS)  # of what people write
_SCALARS = tuple(field.name for field in dataclasses.fields(RunConfig) if field.name not in _MADE)


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
            "init": "",  # weights to start from: a run, an artifact, or what `tclip import` reads; "": random ones
            "init_scales": "keep",  # of ternary weights in init: keep, or recompute from scale · trit by the quantizer
            "teacher": "",  # a run's workdir, an artifact or another library's checkpoint; "": none
            "inherit": "",  # the same of a wider or deeper model, whose layers and channels the student starts from
            "ternary_warmup_steps": 0,  # over which weights go from full precision to ternary
            "telemetry_every": 100,  # steps between looks at trits, scales and latent weights; 0: none
            "log_every": 100,  # steps between lines of loss, speed and where the time went in the log; 0: none
            "max_skipped_steps": 10,  # in a row, whose loss or gradients are not finite, and then the run stops
            "stall_minutes": 30.0,  # without a step before the log names the processes that are behind; 0: never
            "stall_exit": False,  # then end all processes with code 69, on which launchers restart a few times
            "compile_cache": "",  # folder of compiled programs, for the next start; "": JAX_COMPILATION_CACHE_DIR's
            "profile_steps": (),  # (first, last) of a trace for xprof in <workdir>/profile
            "wandb_project": "",  # of Weights & Biases, which is then needed; "": none
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
            **{key: values[key] for key in _SCALARS},
            "model": model,
            "preprocess": Preprocess.from_open_clip(values["preprocess"], model.vision.image_size),
            "rules": ternary_rules(_rules(values["ternary"], values["quantizer"]), quantizer),
            **sections,
            "profile_steps": tuple(values["profile_steps"]),
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
        ("data.microbatches", run.data.microbatches),
        ("checkpoint.every", run.checkpoint.every),
        ("checkpoint.keep", run.checkpoint.keep),
        ("max_skipped_steps", run.max_skipped_steps),
        ("eval.every", run.eval.every),
        ("eval.batch_size", run.eval.batch_size),
        *((f"evals[{i}].every", each.every) for i, each in enumerate(run.evals)),
        *((f"evals[{i}].batch_size", each.batch_size) for i, each in enumerate(run.evals)),
    ):
        if value < 1:
            raise ValueError(f"config.{name} is {value}: it must be at least 1")
    check_tensor(run.model, run.rules, max(run.mesh.tensor, 1))
    for name, amount in (
        ("checkpoint.every_minutes", run.checkpoint.every_minutes),
        ("checkpoint.keep_best", run.checkpoint.keep_best),
        ("log_every", run.log_every),
        ("stall_minutes", run.stall_minutes),
    ):
        if not amount >= 0:
            raise ValueError(f"config.{name} is {amount}: it must be at least 0")
    profiled = run.profile_steps
    if profiled and not (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1] <= run.steps):
        raise ValueError(f"config.profile_steps is {profiled}: it must be (first, last), 1 <= first <= last <= steps")
    if run.data.batch_size % run.data.microbatches:
        raise ValueError(
            f"config.data.batch_size {run.data.batch_size} is not divisible by"
            f" config.data.microbatches {run.data.microbatches}"
        )
    if not 0 <= run.data.max_bad_share <= 1:
        raise ValueError(f"config.data.max_bad_share is {run.data.max_bad_share}: it must be between 0 and 1")
    if run.init and run.inherit:
        raise ValueError("config.init and config.inherit both say where to start: one must be empty")
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
    for name, count in (
        ("ternary_warmup_steps", run.ternary_warmup_steps),
        ("optimizer.recovery_steps", run.optimizer.recovery_steps + run.optimizer.warmup_steps),
    ):
        if not 0 <= count < run.steps:
            raise ValueError(f"config.{name} (with the warmup) {count} is not below config.steps {run.steps}")
    for pattern, changes in run.optimizer.groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.optimizer.groups {pattern!r} is not a regular expression: {error}") from None
        check_keys(changes, ("learning_rate", "weight_decay"), f"config.optimizer.groups {pattern!r}")
    check_keys(run.loss.towers, ("image", "text"), "config.loss.towers")
    if run.teacher and run.data.teacher_cache:
        raise ValueError("config.teacher and config.data.teacher_cache are two teachers: give one of them")
    if run.loss.needs_teacher and not (run.teacher or run.data.teacher_cache):
        raise ValueError(
            f"config.loss.{run.loss.needs_teacher[0]} needs a teacher: set config.teacher to a workdir or an artifact"
        )
    if run.loss.states and run.data.teacher_cache:
        raise ValueError("config.loss.hidden and relations need a teacher in the step: a cache holds embeddings alone")
    for tower, depth in (("image", run.model.vision.layers), ("text", run.model.text.layers)):
        if run.loss.states and tower in run.loss.towers:
            for layer in run.loss.layers:
                if not -depth <= layer < depth:
                    raise ValueError(f"config.loss.layers has {layer}: the {tower} tower has {depth} layers")
