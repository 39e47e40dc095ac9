"""The configuration of a run: every key once, with its type, default, unit and bounds."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import ml_collections
from etils import epath

from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.images import Preprocess
from tclip_jax.data.prompts import get_templates
from tclip_jax.losses.registry import LOSSES, Need
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.layers import check_tensor
from tclip_jax.models.presets import model_cfg, preprocess_cfg
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.runs.checkpoints import CheckpointConfig
from tclip_jax.schema import MOST, check_keys, defaults, from_mapping, key
from tclip_jax.ternary import Quantizer


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


if TYPE_CHECKING:

    class _Weights:
        """A float field for each of `LOSSES`."""

        def __getattr__(self, name: str) -> float: ...

else:
    _Weights = dataclasses.make_dataclass(
        "_Weights",
        [(name, float, key(loss.default, f"weight: {loss.doc}", ge=0)) for name, loss in LOSSES.items()],
        frozen=True,
    )


@dataclasses.dataclass(frozen=True)
class LossConfig(_Weights):
    """Weights of the losses, by their names, and their options; all but `task` need a teacher."""

    task_kind: Literal["info_nce", "sigmoid"] = key("info_nce", "sigmoid: SigLIP's, with a learned bias from −10 on")
    fd_kind: Literal["mse", "cosine"] = key("mse", "the distance of fd")
    kl_reverse: float = key(0.5, "share of KL(student ‖ teacher) in kl", ge=0, le=1)
    hidden_kind: Literal["mse", "cosine"] = key("cosine", "the distance of hidden")
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
        if not self.weights:
            raise ValueError("config.loss: all weights are 0, so nothing would be learned: give one of them")

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0."""
        return {name: getattr(self, name) for name in LOSSES if getattr(self, name)}

    def needs(self, need: Need) -> bool:
        """Whether a loss with a weight needs this."""
        return any(need in LOSSES[name].needs for name in self.weights)

    @property
    def states(self) -> tuple[Need, ...]:
        """What is recorded inside the towers."""
        kinds: tuple[Need, ...] = ("hidden", "qkv")
        return tuple(kind for kind in kinds if self.needs(kind))

    @property
    def sigmoid(self) -> bool:
        """Whether the student's logits have a bias."""
        return bool(self.task) and self.task_kind == "sigmoid"

    @property
    def needs_teacher(self) -> tuple[str, ...]:
        """The losses with a weight that compare with a teacher."""
        return tuple(name for name in self.weights if LOSSES[name].needs)


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """What an entry of `optimizer.groups` changes for the parameters that its regex matches."""

    learning_rate: float = key(1.0, "factor of the schedule", ge=0)
    weight_decay: float = key(0.0, "instead of the optimizer's", ge=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with linear warmup, cosine decay and, if wanted, a recovery phase at a low learning rate."""

    name: str = key("adamw", "adamw, adafactor, lion or muon")
    learning_rate: float = key(1e-3, "the peak", gt=0)
    warmup_steps: int = key(0, "over which the learning rate grows from 0", ge=0, le=MOST)
    recovery_steps: int = key(0, "the last of all steps; the cosine ends where they begin (FTerViT)", ge=0, le=MOST)
    recovery_learning_rate: float = key(0.0, "where the cosine ends, and what is kept from then on", ge=0)
    weight_decay: float = key(0.1, "none for biases, LayerNorm, class embedding, logit scale and learned scales", ge=0)
    b1: float = key(0.9, "decay of the mean of gradients (the first moment, or momentum)", ge=0, lt=1)
    b2: float = key(0.98, "decay of the mean of their squares; of the momentum that lion keeps", ge=0, lt=1)
    eps: float = key(1e-6, "added to the root of that mean (adamw, muon)", gt=0)
    mu_dtype: Literal["float32", "bfloat16"] = key("float32", "of the first moment; bfloat16 halves its memory")
    clip_norm: float = key(0.0, "of the global gradient; 0: no clipping", ge=0)
    groups: tuple[tuple[str, dict[str, float] | None], ...] = key(
        (),
        '(regex, {"learning_rate": factor of the schedule, "weight_decay": instead of the above}), or (regex, None) to'
        " freeze, of whole paths like clip/image/blocks/mlp/fc1/kernel; the first that matches decides",
    )
    ema_decay: float = key(0.0, "of an average of the latent weights, evaluated beside them; 0: none", ge=0, lt=1)

    def __post_init__(self) -> None:
        _as_tuples(self, "groups")
        for pattern, changes in self.groups:
            if changes is not None:
                from_mapping(GroupConfig, changes, f"config.optimizer.groups {pattern!r}")

    @property
    def freezes(self) -> bool:
        """Whether some parameters are frozen."""
        return any(changes is None for _, changes in self.groups)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one may be −1, the rest."""

    data: int = key(-1, "data-parallel replicas: each has its own rows of a batch", ge=1, also=(-1,))
    fsdp: int = key(1, "FSDP shards of parameters and optimizer state, each with its own rows", ge=1, also=(-1,))
    tensor: int = key(
        1,
        "tensor-parallel shards of every product; must divide heads, and inputs into whole groups",
        ge=1,
        also=(-1,),
    )
    slices: int = key(
        -1, "TPU slices (or processes) that `data` spans; −1: as many as the devices belong to", ge=1, also=(-1,)
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
    telemetry_every: int = key(
        100, "steps between snapshots of trits, scales and latent weights; 0: none", ge=0, le=MOST
    )
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


def read_config(workdir: epath.PathLike) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or not a configuration of this version.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected the workdir of `tclip train`, or an artifact")
    try:
        return run_config(ml_collections.ConfigDict(json.loads(path.read_text())))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
