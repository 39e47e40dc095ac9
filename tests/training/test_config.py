"""What a user writes wrong is named, with what would be right."""

from __future__ import annotations

from typing import Any

import ml_collections
import pytest

from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.ternary import Quantizer
from tclip_jax.training.config import base_config, run_config


def changed(**changes: Any) -> ml_collections.ConfigDict:
    config = base_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def test_defaults_make_a_run() -> None:
    run = run_config(base_config())
    assert run.model.vision.image_size == run.preprocess.size == (32, 32)
    assert run.rules == () and run.loss.task == 1.0 and run.optimizer.b2 == 0.98


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_run(preset: str) -> None:
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
        ({"model__vision_cfg__patch_size": 5}, "image size 32 is not divisible by patch size 5"),
        ({"model__text_cfg__heads": 5}, "text width 64 is not divisible by 5 heads"),
        ({"quantizer__factor": -1.0}, "factor is -1.0"),
        ({"ternary": "Q-SOME"}, "there are none, Q-FFN, Q-ALL"),
        ({"ternary": [("(", {})]}, "is not a regular expression"),
        ({"ternary": [("a", {"facto": 1})]}, "has no 'facto': the nearest is 'factor'"),
        ({"loss__hidden": 1.0}, "config.loss.hidden needs a teacher"),
        ({"loss__relations": 1.0, "data__teacher_cache": "c"}, "need a teacher in the step"),
        ({"loss__hidden": 1.0, "teacher": "t", "loss__layers": (5,)}, "config.loss.layers has 5: the image tower has"),
        ({"loss__towers": ("vision",)}, "config.loss.towers has no 'vision': the nearest is"),
        ({"teacher": "t", "data__teacher_cache": "c"}, "are two teachers"),
        ({"ternary_warmup_steps": 1000}, "ternary_warmup_steps .* 1000 is not below config.steps 1000"),
        ({"optimizer__recovery_steps": 1000}, "recovery_steps .* is not below config.steps 1000"),
        ({"optimizer__groups": [("(", {})]}, "groups '\\(' is not a regular expression"),
        ({"optimizer__groups": [("a", {"rate": 1.0})]}, "groups 'a' has no 'rate': the nearest is"),
        ({"quantizer__kind": "lsg"}, "kind is 'lsg': it must be one of 'factor', 'twn'"),
        ({"evals": ({"name": "a", "sauce": "digits"},)}, r"config.evals\[0\] has no 'sauce': the nearest is 'source'"),
        ({"evals": ({"source": "digits"},)}, r"config.evals have the names \[''\]: each must have one of its own"),
        ({"evals": ({"name": "a", "source": "digits"}, {"name": "a", "source": "digits"})}, "one of its own"),
        ({"evals": ({"name": "a"},)}, "config.evals: each must have a source"),
        ({"evals": ({"name": "a", "source": "digits", "every": 0},)}, r"config.evals\[0\].every is 0"),
        ({"preprocess__size": (16, 16)}, r"\(16, 16\) is not the model's image size \(32, 32\)"),
    ],
)
def test_impossible_values(changes: dict[str, Any], message: str) -> None:
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
