"""What a run is: a ConfigDict for people, frozen dataclasses inside, whose declarations are the only ones."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg, preprocess_cfg
from tclip_jax.models.tensor_parallel import check_tensor
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.runs.policy import CheckpointConfig
from tclip_jax.schema import MOST, check_keys, defaults, from_mapping, key
from tclip_jax.ternary import Quantizer
from tclip_jax.training.sections import (
    DataConfig,
    EvalConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run, checked: every key of the top level, and its sections."""

    seed: int = key(0, "of parameters, shuffling and augmentation", ge=0, lt=2**32)
    steps: int = key(1000, "of the optimizer", ge=1, le=MOST)
    model: CLIPConfig = key(doc="open_clip's model_cfg", written=model_cfg("tiny"))
    preprocess: Preprocess = key(doc="open_clip's preprocess_cfg", written=preprocess_cfg())
    ternary: str | tuple[Any, ...] = key(
        "none", "none, Q-FFN, Q-ALL, or a list of (regex, {keys of quantizer that differ})"
    )
    quantizer: Quantizer = key(Quantizer(), "of the weights that `ternary` names")
    dtype: Literal["float32", "bfloat16"] = key("float32", "of the computation; parameters stay float32")
    remat: bool = key(False, "recompute blocks in the backward pass to save memory")
    init: str = key("", 'weights to start from: a run, an artifact, or what `tclip import` reads; "": random ones')
    init_scales: Literal["keep", "recompute"] = key(
        "keep", "of ternary weights in init: keep, or recompute from scale · trit by the quantizer"
    )
    teacher: str = key("", "a run's workdir, an artifact or another library's checkpoint; \"\": none")
    inherit: str = key("", "the same of a wider or deeper model, whose layers and channels the student starts from")
    ternary_warmup_steps: int = key(0, "over which weights go from full precision to ternary", ge=0, le=MOST)
    telemetry_every: int = key(100, "steps between looks at trits, scales and latent weights; 0: none", ge=0, le=MOST)
    log_every: int = key(
        100, "steps between lines of loss, speed and where the time went in the log; 0: none", ge=0, le=MOST
    )
    max_skipped_steps: int = key(
        10,
        "in a row that change nothing, their numbers not finite or no sample usable, and then the run stops",
        ge=1,
        le=MOST,
    )
    stall_minutes: float = key(
        30.0, "without a step before the log names the processes that are behind; 0: never", ge=0
    )
    stall_exit: bool = key(False, "then end all processes with code 69, on which launchers restart a few times")
    compile_cache: str = key("", 'folder of compiled programs, for the next start; "": JAX_COMPILATION_CACHE_DIR\'s')
    profile_steps: tuple[int, ...] = key((), "(first, last) of a trace for xprof in <workdir>/profile", ge=1, le=MOST)
    wandb_project: str = key("", 'of Weights & Biases, which is then needed; "": none')
    data: DataConfig = key(DataConfig())
    loss: LossConfig = key(LossConfig())
    optimizer: OptimizerConfig = key(OptimizerConfig())
    mesh: MeshConfig = key(MeshConfig())
    checkpoint: CheckpointConfig = key(CheckpointConfig())
    eval: EvalConfig = key(EvalConfig())
    evals: tuple[EvalConfig, ...] = key((), "further evaluations: mappings with keys of eval, and each with a name")

    @functools.cached_property
    def rules(self) -> TernaryRules:
        """Which parameters are ternary, and by which quantizer."""
        if isinstance(self.ternary, str):
            return ternary_rules(self.ternary, self.quantizer)
        whole = dataclasses.asdict(self.quantizer)
        return ternary_rules(
            [
                (pattern, from_mapping(Quantizer, {**whole, **changes}, f"config.ternary {pattern!r}"))
                for pattern, changes in self.ternary
            ],
            self.quantizer,
        )


def base_config() -> ml_collections.ConfigDict:
    """Every key at its default: what recipes start from."""
    # A tuple or None may be put where a string stands: types are checked in `run_config`, with clearer errors.
    return ml_collections.ConfigDict(defaults(RunConfig), type_safe=False)


def run_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Checks a configuration whole and converts it.

    Raises:
      ValueError: an unknown key, with the nearest valid name; a wrong type; a value out of its bounds; values that
        contradict each other.
    """
    given = config.to_dict()
    check_keys(given, defaults(RunConfig), "config")
    values = defaults(RunConfig) | given
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.default):
            section = type(field.default)
            values[field.name] = from_mapping(section, values[field.name], f"config.{field.name}")
    model = CLIPConfig.from_open_clip(values["model"])
    evals, profiled = values["evals"], values["profile_steps"]
    if not isinstance(evals, (list, tuple)):
        raise ValueError(f"config.evals is {evals!r}: it must be a list of mappings with keys of config.eval")
    made = {
        "model": model,
        "preprocess": Preprocess.from_open_clip(values["preprocess"], model.vision.image_size),
        "ternary": _pairs(values["ternary"]),
        "profile_steps": tuple(profiled) if isinstance(profiled, list) else profiled,
        "evals": tuple(from_mapping(EvalConfig, each, f"config.evals[{i}]") for i, each in enumerate(evals)),
    }
    run = from_mapping(RunConfig, values | made, "config")
    _check_together(run)
    return run


def _pairs(given: Any) -> str | tuple[Any, ...]:
    """The rules as pairs: JSON has lists."""
    if isinstance(given, str):
        return given
    right = isinstance(given, (list, tuple)) and all(
        isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], Mapping)
        for rule in given
    )
    if not right:
        raise ValueError(f"config.ternary is {given!r}: it must be a name, or a list of (regex, {{changed keys}})")
    return tuple((pattern, dict(changes)) for pattern, changes in given)


def _check_together(run: RunConfig) -> None:
    """Raises ValueError for values that are right alone and contradict each other."""
    check_tensor(run.model, run.rules, max(run.mesh.tensor, 1))
    profiled = run.profile_steps
    if profiled and not (len(profiled) == 2 and profiled[0] <= profiled[1] <= run.steps):
        raise ValueError(f"config.profile_steps is {profiled}: it must be (first, last), first <= last <= steps")
    if run.data.batch_size % run.data.microbatches:
        raise ValueError(
            f"config.data.batch_size {run.data.batch_size} is not divisible by"
            f" config.data.microbatches {run.data.microbatches}"
        )
    if run.init and run.inherit:
        raise ValueError("config.init and config.inherit both say where to start: one must be empty")
    names = [each.name for each in run.evals]
    if len({*names, ""}) <= len(names):
        raise ValueError(f"config.evals have the names {names}: each must have one of its own")
    if not all(each.source for each in run.evals):
        raise ValueError("config.evals: each must have a source")
    if run.optimizer.warmup_steps >= run.steps:
        raise ValueError(
            f"config.optimizer.warmup_steps {run.optimizer.warmup_steps} is not below config.steps {run.steps}"
        )
    if run.optimizer.recovery_learning_rate > run.optimizer.learning_rate:
        raise ValueError(
            f"config.optimizer.recovery_learning_rate {run.optimizer.recovery_learning_rate} is above"
            f" config.optimizer.learning_rate {run.optimizer.learning_rate}"
        )
    if run.preprocess.size != run.model.vision.image_size:
        raise ValueError(
            f"config.preprocess.size {run.preprocess.size} is not the model's image size {run.model.vision.image_size}"
        )
    for name, count in (
        ("ternary_warmup_steps", run.ternary_warmup_steps),
        ("optimizer.recovery_steps", run.optimizer.recovery_steps + run.optimizer.warmup_steps),
    ):
        if count >= run.steps:
            raise ValueError(f"config.{name} (with the warmup) {count} is not below config.steps {run.steps}")
    for pattern, _ in run.optimizer.groups:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"config.optimizer.groups {pattern!r} is not a regular expression: {error}") from None
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
