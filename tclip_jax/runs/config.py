"""The configuration of a run: every key with its type, default, unit and bounds."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from etils import epath

from tclip_jax.data.augment import AUGMENTATIONS
from tclip_jax.data.images import Preprocess
from tclip_jax.data.prompts import get_templates
from tclip_jax.data.sources import source_specs
from tclip_jax.losses.registry import LOSSES, Need
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg, preprocess_cfg
from tclip_jax.models.ternary_rules import TernaryRules, ternary_rules
from tclip_jax.runs.checkpoints import CheckpointConfig
from tclip_jax.runs.checks import REGISTRIES, check_plugin, check_run
from tclip_jax.runs.record import last_record
from tclip_jax.schema import MOST, check_keys, defaults, from_mapping, key
from tclip_jax.ternary import Quantizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data."""

    source: str = key("digits", "digits, or folder:, tfds:, wds:, arrayrecord:, csv:, parquet:, mixture:")
    split: str = key("train", "split of the source")
    templates: str | tuple[str, ...] = key(
        "", "captions for class names: a set of prompts, or a list with {c}; empty: the data set's prompts, or `simple`"
    )
    augment: str = key(
        "none", "augmentation: none, affine, random_resized_crop, wide_crop, strong, or the name of a plug-in"
    )
    batch_size: int = key(128, "global batch size in images, over all devices", ge=1, le=MOST)
    microbatches: int = key(1, "parts of a batch, to save memory; the loss is the whole batch's", ge=1, le=MOST)
    workers: int = key(0, "processes that prepare batches; 0: threads", ge=0, le=1024)
    max_bad_share: float = key(
        0.1, "fraction of bad samples, among about the last 10,000, above which the run stops", ge=0, le=1
    )
    tokenizer: str = key(
        "", 'tokenizer that is not CLIP\'s own: its folder, an artifact or a run; "": that of init, inherit or teacher'
    )
    teacher_cache: str = key("", "folder written by `tclip teacher-cache`, in place of a teacher in the step")

    def __post_init__(self) -> None:
        _as_tuples(self, "templates")
        AUGMENTATIONS.find(self.augment, "config.data.augment")
        if self.templates:
            get_templates(self.templates)


@dataclasses.dataclass(frozen=True, init=False)
class LossConfig:
    """The weight of each loss, and options of the losses. All losses but `task` need a teacher.

    Args:
      values: weights by the names in `LOSSES`, and options.

    Attributes:
      weights: the losses whose weight is not 0, and their weights.
    """

    weights: dict[str, float] = dataclasses.field(repr=False, hash=False)
    task_kind: Literal["info_nce", "sigmoid"] = key("info_nce", "sigmoid: SigLIP's loss, with a learned bias from −10")
    fd_kind: Literal["mse", "cosine"] = key("mse", "distance of fd")
    kl_reverse: float = key(0.5, "weight of KL(student ‖ teacher) in kl; the rest is KL(teacher ‖ student)", ge=0, le=1)
    hidden_kind: Literal["mse", "cosine"] = key("cosine", "distance of hidden")
    relation_heads: int = key(8, "relation heads among which relations splits the channels", ge=1, le=MOST)
    layers: tuple[int, ...] = key(
        (-1,), "student layers for hidden and relations; the teacher's are those at the same relative depth"
    )
    towers: tuple[str, ...] = key(
        ("image", "text"), "towers for hidden and relations; both models have equal token counts"
    )
    positives: Literal["diagonal", "equal_text"] = key("diagonal", "equal_text: equal captions are positives too")
    distributed: Literal["gather", "ring"] = key("gather", "all-gather embeddings, or pass them around a ring")
    ring_chunk: int = key(1024, "ring: remote embeddings that a device compares at a time", ge=1, le=MOST)

    @staticmethod
    def more_keys() -> type:
        """Return a declaration of the weights, which depends on the registered losses."""
        options = {field.name for field in dataclasses.fields(LossConfig)}
        heads = {"image", "text", "icl_scale", "sigmoid_bias"}
        if clash := sorted((options | heads) & {*LOSSES}):
            raise ValueError(f"the loss {clash[0]!r} of a plug-in has the name of an option or a head: rename it")
        weights = {name: key(loss.default, f"weight: {loss.doc}", ge=0) for name, loss in LOSSES.items()}
        return dataclasses.make_dataclass("Weights", [(name, float, each) for name, each in weights.items()])

    def __init__(self, **values: Any) -> None:
        check_keys(values, keys := defaults(LossConfig), "config.loss")
        values = keys | values
        weights = {name: values.pop(name) for name in LOSSES}
        for name, value in {**values, "weights": {name: each for name, each in weights.items() if each}}.items():
            object.__setattr__(self, name, value)
        _as_tuples(self, "layers", "towers")
        check_keys(self.towers, ("image", "text"), "config.loss.towers")
        if not self.weights:
            raise ValueError("config.loss: all weights are 0: set at least one above 0")

    def needs(self, need: Need) -> bool:
        """Whether a loss whose weight is not 0 has this need."""
        return any(need in LOSSES[name].needs for name in self.weights)

    @property
    def states(self) -> tuple[Need, ...]:
        """The states of the towers' layers that the losses compare."""
        kinds: tuple[Need, ...] = ("hidden", "qkv")
        return tuple(kind for kind in kinds if self.needs(kind))

    @property
    def sigmoid(self) -> bool:
        """Whether the student's logits have a bias, as in SigLIP."""
        return "task" in self.weights and self.task_kind == "sigmoid"

    @property
    def needs_teacher(self) -> tuple[str, ...]:
        """The losses whose weight is not 0 and that need a teacher."""
        return tuple(name for name in self.weights if LOSSES[name].needs)


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Changes of the optimizer for the parameters whose path a regex of `optimizer.groups` matches."""

    learning_rate: float = key(1.0, "factor of the learning rate schedule", ge=0)
    weight_decay: float = key(0.0, "weight decay, in place of optimizer.weight_decay", ge=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with linear warmup, cosine decay and an optional recovery phase at a low learning rate."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = key("adamw", "the optimizer")
    learning_rate: float = key(1e-3, "peak learning rate", gt=0)
    warmup_steps: int = key(0, "steps of linear warmup from 0", ge=0, le=MOST)
    recovery_steps: int = key(0, "steps of recovery at the end, after the cosine decay (FTerViT)", ge=0, le=MOST)
    recovery_learning_rate: float = key(
        0.0, "learning rate in recovery, or at its start; without a decay also the end of the cosine decay", ge=0
    )
    recovery_decay: Literal["none", "cosine"] = key(
        "none", "recovery at a constant rate; or a second cosine decay to 0, after the first has reached 0"
    )
    weight_decay: float = key(
        0.1, "weight decay; none for biases, LayerNorm, class embedding, logit scale and learned scales", ge=0
    )
    b1: float = key(0.9, "decay of the first moment, or momentum", ge=0, lt=1)
    b2: float = key(0.98, "decay of the second moment; for lion, of its momentum", ge=0, lt=1)
    eps: float = key(1e-6, "added to the root of the second moment (adamw, muon)", gt=0)
    mu_dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of the first moment; bfloat16 halves its memory")
    clip_norm: float = key(0.0, "maximum global norm of the gradient; 0: no clipping", ge=0)
    groups: tuple[tuple[str, dict[str, float] | None], ...] = key(
        (),
        "pairs (regex, {changes}), or (regex, None) to freeze; the first that matches a whole path applies"
        " (clip/image/blocks/mlp/fc1/kernel)",
    )
    latent_clip: float = key(
        0.0, "largest magnitude of latent weights after an update, in scales before clipping; 0: no clipping", ge=0
    )
    ema_decay: float = key(0.0, "decay of an average of the latent weights, evaluated too; 0: none", ge=0, lt=1)

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
    """Devices along each axis of the mesh; one axis may be −1, which is all remaining devices."""

    data: int = key(-1, "data-parallel replicas, each with different rows of the batch", ge=1, also=(-1,))
    fsdp: int = key(1, "FSDP shards of the training state, each with different rows", ge=1, also=(-1,))
    tensor: int = key(1, "shards of matrix products; must divide heads, and inputs into whole groups", ge=1, also=(-1,))
    slices: int = key(-1, "TPU slices (or processes) spanned by `data`; −1: those of the devices", ge=1, also=(-1,))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training: zero-shot tasks, or the loss over held-out pairs."""

    kind: Literal["tasks", "loss"] = key(
        "tasks", "tasks: those of `tclip evaluate`; loss: the training loss of the split"
    )
    source: str = key("", 'as data.source; with a suite, the folder of its exports; "": no evaluation')
    suite: str = key("", "names of suites and data sets, as in `tclip evaluate --suite`")
    split: str = key("test", "split of the source")
    templates: str | tuple[str, ...] = key("", "as data.templates")
    every: int = key(1000, "steps between evaluations; the last step is always evaluated", ge=1, le=MOST)
    batch_size: int = key(128, "images per batch, over all devices", ge=1, le=MOST)
    name: str = key("", 'metrics are <name>/<metric>, of a suite <name>/<data set>/<metric>; "": zero_shot_accuracy')

    def __post_init__(self) -> None:
        _as_tuples(self, "templates")
        if self.templates:
            get_templates(self.templates)


def _as_tuples(config: Any, *names: str) -> None:
    """Convert the lists of a JSON file to tuples."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            object.__setattr__(config, name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run, checked: the keys of the top level, and the sections."""

    seed: int = key(0, "random seed of parameters, shuffling and augmentation", ge=0, lt=2**32)
    steps: int = key(1000, "training steps", ge=1, le=MOST)
    model: CLIPConfig = key(doc="the model, as open_clip's model_cfg", written=model_cfg("tiny"))
    preprocess: Preprocess = key(doc="image preprocessing, as open_clip's preprocess_cfg", written=preprocess_cfg())
    ternary: str | tuple[Any, ...] = key(
        "none", "ternary weights: none, Q-FFN, Q-ALL, or a list of (regex, {changed keys of quantizer})"
    )
    quantizer: Quantizer = key(Quantizer(), "quantizer of the weights that `ternary` selects")
    dtype: Literal["float32", "bfloat16"] = key("float32", "dtype of the computation; parameters stay float32")
    gradient_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "dtype in which devices add their sums of the gradients of the blocks' matrices; at most `dtype`"
    )
    remat: bool = key(False, "recompute blocks and patches in the backward pass to save memory")
    attention: Literal["auto", "reference", "mosaic_tpu", "cudnn"] = key(
        "auto", "self-attention of the step: fused where device and shapes allow (auto), or always this implementation"
    )
    init: str = key("", 'initial weights: a run, an artifact, or a file that `tclip import` reads; "": random')
    init_scales: Literal["keep", "recompute"] = key(
        "keep", "scales of ternary weights in init: keep them, or recompute them from scale · trit with the quantizer"
    )
    teacher: str = key("", "a run's workdir, an artifact or another library's checkpoint; \"\": no teacher")
    teacher_int8: bool = key(
        False,
        "run the teacher's blocks in int8: weights with a scale per channel, activations per token",
    )
    inherit: str = key("", "a wider or deeper model, as in teacher, whose layers and channels initialize the student")
    ternary_warmup_steps: int = key(0, "steps of blending from full precision to ternary", ge=0, le=MOST)
    ternary_anneal_steps: int = key(
        0, "then, steps in which soft trits become hard, as their temperature falls to 0 (Hestia)", ge=0, le=MOST
    )
    ternary_temperature: float = key(
        0.4, "temperature of soft trits before ternary_anneal_steps, relative to the squared scale", gt=0
    )
    telemetry_every: int = key(100, "steps between snapshots of trits and weights; 0: none", ge=0, le=MOST)
    log_every: int = key(100, "steps between log lines with loss, speed and time; 0: none", ge=0, le=MOST)
    max_skipped_steps: int = key(
        10, "stop after so many steps in a row without a finite loss and gradient, or a usable sample", ge=1, le=MOST
    )
    stall_minutes: float = key(30.0, "minutes without a step before the log names stalled processes; 0: never", ge=0)
    stall_exit: bool = key(False, "after stall_minutes, exit with code 69: launchers restart the run a few times")
    compile_cache: str = key("", 'folder that caches compiled programs; "": JAX_COMPILATION_CACHE_DIR')
    profile_steps: tuple[int, ...] = key((), "(first, last) step of an xprof trace in <workdir>/profile", ge=1, le=MOST)
    wandb_project: str = key("", 'project of Weights & Biases, which must be installed; "": none')
    data: DataConfig = key(DataConfig())
    loss: LossConfig = key(LossConfig())
    optimizer: OptimizerConfig = key(OptimizerConfig())
    mesh: MeshConfig = key(MeshConfig())
    checkpoint: CheckpointConfig = key(CheckpointConfig())
    eval: EvalConfig = key(EvalConfig())
    evals: tuple[EvalConfig, ...] = key((), "further evaluations: mappings with the keys of eval, each with a name")

    @functools.cached_property
    def rules(self) -> TernaryRules:
        """The parameters that are ternary, by regex, and their quantizers."""
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

    @property
    def plugins(self) -> dict[str, dict[str, str]]:
        """The plug-ins that the run uses, as {"loss gap": {"file": its file, "sha256": that of the file}}."""
        used = {
            "quantizer": [quantizer.kind for _, quantizer in self.rules],
            "loss": [*self.loss.weights],
            "augmentation": [self.data.augment],
            "source": [spec.partition(":")[0] for spec in source_specs(self.data.source)],
        }
        named = {f"{what} {name}": REGISTRIES[what].plugin(name) for what, names in used.items() for name in names}
        return {name: plugin for name, plugin in named.items() if plugin}


def base_config() -> ml_collections.ConfigDict:
    """Return every key with its default; recipes start from it."""
    # `run_config` checks the types: some keys accept several, and its errors are clearer.
    return ml_collections.ConfigDict(defaults(RunConfig), type_safe=False)


def run_config(config: ml_collections.ConfigDict) -> RunConfig:
    """Check a configuration and convert it; absent keys have their defaults.

    Raises:
      ValueError: a key is unknown, a value has the wrong type or is out of bounds, or values contradict each other.
    """
    changes = config.to_dict()
    check_keys(changes, defaults(RunConfig), "config")
    values = defaults(RunConfig) | changes
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.default):
            section = type(field.default)
            values[field.name] = from_mapping(section, values[field.name], f"config.{field.name}")
    model = CLIPConfig.from_open_clip(values["model"])
    evals, profile_steps = values["evals"], values["profile_steps"]
    if not isinstance(evals, (list, tuple)):
        raise ValueError(f"config.evals is {evals!r}: it must be a list of mappings with keys of config.eval")
    converted = {
        "model": model,
        "preprocess": Preprocess.from_open_clip(values["preprocess"], model.vision.image_size),
        "ternary": _ternary_pairs(values["ternary"]),
        "profile_steps": tuple(profile_steps) if isinstance(profile_steps, list) else profile_steps,
        "evals": tuple(from_mapping(EvalConfig, each, f"config.evals[{i}]") for i, each in enumerate(evals)),
    }
    run = from_mapping(RunConfig, values | converted, "config")
    check_run(run)
    return run


def read_config(workdir: epath.PathLike) -> RunConfig:
    """Return the resolved configuration of the run in `workdir`.

    Raises:
      FileNotFoundError: `workdir` has no config.json.
      ValueError: config.json is not JSON, or not a valid configuration of this version.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        missing = path if path.parent.exists() else path.parent
        raise FileNotFoundError(
            f"{missing}: no such file or folder; expected the workdir of `tclip train`, an artifact, or a checkpoint of"
            " another library"
        )
    try:
        values = json.loads(path.read_text())
        for name, plugin in (last_record(workdir).get("plugins") or {}).items():
            check_plugin(name, plugin)
        return run_config(ml_collections.ConfigDict(values))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _ternary_pairs(value: Any) -> str | tuple[Any, ...]:
    """Return `config.ternary` with pairs as tuples, which are lists in JSON."""
    if isinstance(value, str):
        return value
    valid = isinstance(value, (list, tuple)) and all(
        isinstance(rule, (list, tuple)) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], Mapping)
        for rule in value
    )
    if not valid:
        raise ValueError(f"config.ternary is {value!r}: it must be a name, or a list of (regex, {{changed keys}})")
    return tuple((pattern, dict(changes)) for pattern, changes in value)
