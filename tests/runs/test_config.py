"""Invalid configurations: the error names the key and its valid values."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import ml_collections
import pytest

from tclip_jax.models.config import TextConfig, VisionConfig
from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.runs.config import RunConfig, base_config, run_config
from tclip_jax.schema import Bounds, key_of
from tclip_jax.ternary import Quantizer


def changed(**changes: Any) -> ml_collections.ConfigDict:
    config = base_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def test_the_defaults_are_valid() -> None:
    run = run_config(base_config())
    assert run.model.vision.image_size == run.preprocess.size == (32, 32)
    assert run.rules == () and run.loss.weights == {"task": 1.0} and run.optimizer.b2 == 0.98


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset: str) -> None:
    config = base_config()
    config.model = model_cfg(preset)
    assert run_config(config).model.embed_dim == PRESETS[preset]["embed_dim"]


def test_named_ternary_set_takes_the_quantizer() -> None:
    run = run_config(changed(ternary="Q-ALL", quantizer__factor=1.0, quantizer__group="channel"))
    assert {quantizer for _, quantizer in run.rules} == {Quantizer(1.0, "channel")} and len(run.rules) == 3


def test_list_of_rules_changes_the_quantizer_by_regex() -> None:
    config = changed(ternary=[("image/.*", {"factor": 1.0}), ("text/.*", {})])
    assert run_config(config).rules == (("image/.*", Quantizer(1.0)), ("text/.*", Quantizer(2.0)))


def test_round_trip_through_json() -> None:
    import json

    evals = ({"name": "all", "source": "exports", "suite": "clip-benchmark-41"},)
    config = changed(ternary=[("image/.*", {"factor": 1.0})], preprocess__size=[32, 32], evals=evals)
    assert run_config(ml_collections.ConfigDict(json.loads(config.to_json()))) == run_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "many"}, "config.steps is 'many': it must be int"),
        ({"steps": 0}, "config.steps is 0: it must be at least 1"),
        ({"remat": 1}, "config.remat is 1: it must be bool"),
        ({"dtype": "float16"}, "config.dtype is 'float16'"),
        ({"loss__positives": "same"}, "config.loss.positives is 'same'"),
        ({"loss__crd": 1.0}, "config.loss.crd needs a teacher"),
        ({"optimizer__warmup_steps": 1000}, "warmup_steps 1000 is not below config.steps 1000"),
        ({"optimizer__learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"model__vision_cfg__patch_size": 33}, "image size 32 is smaller than patch size 33"),
        ({"model__text_cfg__heads": 5}, "text width 64 is not divisible by 5 heads"),
        ({"quantizer__factor": -1.0}, "factor is -1.0"),
        ({"ternary": "Q-SOME"}, "there are none, Q-FFN, Q-ALL"),
        ({"ternary": [("(", {})]}, "is not a regular expression"),
        ({"ternary": [("a", {"facto": 1})]}, "has no 'facto': the nearest is 'factor'"),
        ({"loss__hidden": 1.0}, "config.loss.hidden needs a teacher"),
        ({"loss__relations": 1.0, "data__teacher_cache": "c"}, "need a teacher in the step"),
        ({"loss__hidden": 1.0, "teacher": "t", "loss__layers": (5,)}, "config.loss.layers has 5: the image tower has"),
        ({"loss__towers": ("vision",)}, "config.loss.towers has no 'vision': it has image, text$"),
        ({"teacher": "t", "data__teacher_cache": "c"}, "are two teachers"),
        ({"ternary_warmup_steps": 1000}, "ternary_warmup_steps .* 1000 is not below config.steps 1000"),
        (
            {"ternary_warmup_steps": 300, "ternary_anneal_steps": 700},
            "ternary_anneal_steps .* 1000 is not below config.steps 1000",
        ),
        ({"gradient_dtype": "bfloat16"}, "gradient_dtype is 'bfloat16', but config.dtype 'float32': set both"),
        (
            {"ternary": "Q-ALL", "quantizer__kind": "lsq", "ternary_anneal_steps": 10},
            "ternary_anneal_steps is 10, but quantizers of kind lsq learn their scale",
        ),
        (
            {"ternary": "Q-ALL", "quantizer__kind": "sherry", "ternary_anneal_steps": 10},
            "ternary_anneal_steps is 10, but quantizers of kind sherry have a threshold per weight: soft trits need",
        ),
        (
            {"ternary": "Q-ALL", "quantizer__kind": "twn", "optimizer__latent_clip": 1.0},
            "latent_clip is 1, which would lower the scales of twn group=256 .*: set it to 0, or to 1.48 or more",
        ),
        (
            {"optimizer__recovery_decay": "cosine", "optimizer__recovery_learning_rate": 1e-4},
            "recovery_decay is 'cosine': set recovery_steps and recovery_learning_rate above 0",
        ),
        (
            {"optimizer__recovery_decay": "cosine", "optimizer__recovery_steps": 10},
            "recovery_decay is 'cosine': set recovery_steps and recovery_learning_rate above 0",
        ),
        (
            {"ternary": [(".*", {"kind": "uniform"})], "quantizer__dead_zone_bias": 0.5},
            "dead_zone_bias is 0.5, but the kind uniform has no trits: set it to 0.0",
        ),
        ({"optimizer__recovery_steps": 1000}, "recovery_steps .* is not below config.steps 1000"),
        ({"optimizer__groups": [("(", {})]}, "groups '\\(' is not a regular expression"),
        (
            {"optimizer__groups": [("a", {"rate": 1.0})]},
            "groups 'a' has no 'rate': it has learning_rate, weight_decay$",
        ),
        ({"quantizer__kind": "lsg"}, "kind is 'lsg': it must be one of 'factor', 'twn'"),
        ({"evals": ({"name": "a", "sauce": "digits"},)}, r"config.evals\[0\] has no 'sauce': the nearest is 'source'"),
        (
            {"evals": ({"source": "digits"},)},
            r"config.evals has the names \[''\]: each evaluation needs a different name",
        ),
        (
            {"evals": ({"name": "a", "source": "digits"}, {"name": "a", "source": "digits"})},
            "each evaluation needs a different name",
        ),
        ({"evals": ({"name": "a"},)}, "config.evals: each evaluation needs a source"),
        ({"evals": ({"name": "a", "source": "digits", "every": 0},)}, r"config.evals\[0\].every is 0"),
        ({"preprocess__size": (16, 16)}, r"\(16, 16\) is not the model's image size \(32, 32\)"),
    ],
)
def test_invalid_and_contradictory_values_are_named(changes: dict[str, Any], message: str) -> None:
    config = base_config()
    with config.unlocked(), config.preprocess.unlocked():
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            section = config
            for parent in parents:
                section = section[parent]
            section[leaf] = value
    with pytest.raises(ValueError, match=message):
        run_config(config)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("", "step", "steps"),
        ("loss", "crt", "crd"),
        ("data", "batchsize", "batch_size"),
        ("model", "embed", "embed_dim"),
    ],
)
def test_unknown_key_names_the_nearest(section: str, key: str, nearest: str) -> None:
    config = base_config()
    part = config[section] if section else config
    with part.unlocked():
        part[key] = 1
    with pytest.raises(ValueError, match=f"has no '{key}': the nearest is '{nearest}'"):
        run_config(config)


def _numbers(cls: type, where: str) -> Iterator[tuple[str, dataclasses.Field[Any], Bounds]]:
    """Yields the path, field and bounds of every key with numbers."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from _numbers(type(field.default), f"{where}{field.name}.")
        elif hints[field.name] in (int, float, tuple[int, ...], float | None):
            yield f"{where}{field.name}", field, key_of(field).bounds


NUMBERS = [
    *_numbers(RunConfig, ""),
    *_numbers(VisionConfig, "model.vision_cfg."),
    *_numbers(TextConfig, "model.text_cfg."),
]
UNBOUNDED = {"loss.layers", "model.vision_cfg.ls_init_value", "model.text_cfg.ls_init_value"}


def refusal(path: str, value: Any) -> str:
    """Returns the error of a configuration with this value."""
    config = base_config()
    *parents, leaf = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    with section.unlocked(), section.ignore_type():
        section[leaf] = value
    with pytest.raises(ValueError) as error:
        run_config(config)
    return str(error.value)


@pytest.mark.parametrize(("path", "field", "bounds"), NUMBERS, ids=[path for path, *_ in NUMBERS])
def test_every_number_has_bounds_that_are_enforced(path: str, field: dataclasses.Field[Any], bounds: Bounds) -> None:
    assert (bounds == Bounds()) == (path in UNBOUNDED)
    kind = float if "float" in str(field.type) else int
    outside: list[Any] = [math.nan, math.inf, -math.inf] if kind is float else [0.5]
    step = 1 if kind is int else 1e-6
    for name, values in (
        ("ge", lambda limit: [limit - step]),
        ("gt", lambda limit: [limit, limit - step]),
        ("le", lambda limit: [limit + step]),
        ("lt", lambda limit: [limit, limit + step]),
    ):
        if (limit := getattr(bounds, name)) is not None:
            outside += values(limit)
    for value in outside:
        if value not in bounds.also:
            message = refusal(path, (value,) if "tuple" in str(field.type) else value)
            assert path.removeprefix("model.") in message and "\n" not in message, message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("evals", 3, "config.evals is 3: it must be a list of mappings"),
        ("profile_steps", 3, "config.profile_steps is 3: it must be tuple of int"),
        ("profile_steps", (0, 1), r"config.profile_steps is \(0, 1\): it must be at least 1"),
        ("ternary", 3, "config.ternary is 3: it must be a name, or a list"),
        ("ternary", [("a", 3)], "config.ternary is .*: it must be a name, or a list"),
        ("loss.task", 0.0, "config.loss: all weights are 0"),
        (
            "optimizer.groups",
            [("a", {"learning_rate": -1.0})],
            "groups 'a'.learning_rate is -1.0: it must be at least 0",
        ),
        ("optimizer.recovery_learning_rate", 1.0, "recovery_learning_rate 1.0 is above config.optimizer.learning_rate"),
        ("data.augment", "blur", "config.data.augment is 'blur': it must be one of 'none', 'affine'"),
        ("data.templates", ["a photo"], r"template 'a photo' has no \{c\}"),
        ("eval.templates", "nowhere", "templates 'nowhere': no such name"),
    ],
)
def test_invalid_values_of_structured_keys_are_named(path: str, value: Any, message: str) -> None:
    assert re.search(message, refusal(path, value))
