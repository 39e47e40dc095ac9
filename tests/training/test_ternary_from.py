"""The recipe `ternary_from`: the student is the given model, in its architecture, preprocessing and weights."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.artifacts import write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.plan import make_plan
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import loop
from tclip_jax.training.start import initial_weights
from tests import siglip

CLIP = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(32, 32), patch_size=16, width=16, layers=1, head_width=8),
    text=TextConfig(context_length=16, width=16, heads=2, layers=1),
)
SIGLIP = dataclasses.replace(
    CLIP,
    vision=dataclasses.replace(CLIP.vision, approximate="tanh", **siglip.VISION),
    text=dataclasses.replace(CLIP.text, approximate="tanh", **siglip.TEXT),
    init_logit_bias=-10.0,
)
PIXELS = Preprocess(32, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")


@pytest.fixture
def draw() -> Callable[[CLIPConfig], dict[str, Any]]:
    def params(config: CLIPConfig) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), param_shapes(config))
        # As in published SigLIPs, where exp(logit_scale) is above CLIP's bound of 100.
        return drawn | {"logit_scale": np.float32(4.77 if "logit_bias" in drawn else 3)}

    return params


@pytest.mark.slow
def test_a_siglip_is_trained_from_itself(draw: Callable[[CLIPConfig], dict[str, Any]], tmp_path: pathlib.Path) -> None:
    source, params = tmp_path / "siglip", draw(SIGLIP)
    write_artifact(source, config=SIGLIP, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    config = load_recipe(f"ternary_from:{source},runlocal")
    run = run_config(config)
    assert run.model == SIGLIP and run.preprocess == PIXELS and run.teacher == run.init == str(source)
    assert run.loss.weights == {"task": 1.0, "crd": 1.0} and run.loss.sigmoid and len(run.rules) == 3
    for path, leaf in flatten(initial_weights(run)).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path], path)
    config.optimizer.learning_rate = 1e-3
    loop.train(config, tmp_path / "run")
    metrics = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(metrics) == 4 and all(np.isfinite(line["loss"]) and line["loss/crd"] > 0 for line in metrics)
    assert metrics[-1]["logit_scale"] == pytest.approx(np.exp(4.77), rel=0.01)


@pytest.mark.parametrize("to", ["open_clip", "big_vision"])
def test_a_checkpoint_of_another_library_is_a_source(
    to: str, draw: Callable[[CLIPConfig], dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    config = SIGLIP if to == "big_vision" else CLIP
    export_model(tmp_path / "x", config=config, preprocess=PIXELS, params=draw(config), formats=[to])
    source = tmp_path / "x" / "big_vision.npz" if to == "big_vision" else tmp_path / "x"
    run = run_config(load_recipe(f"ternary_from:{source}"))
    assert run.loss.task_kind == ("sigmoid" if to == "big_vision" else "info_nce")
    assert run.preprocess == PIXELS and run.model.vision == config.vision


def test_a_run_is_a_source(tmp_path: pathlib.Path) -> None:
    config = base_config()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    run = run_config(override(load_recipe(f"ternary_from:{tmp_path}"), ["teacher=hf-hub:a/b"]))
    assert run.model == run_config(config).model and (run.init, run.teacher) == (str(tmp_path), "hf-hub:a/b")


def test_a_preset_is_planned() -> None:
    config = override(load_recipe("ternary_from:ViT-B-16-SigLIP2"), ["data.batch_size=64"])
    assert run_config(config).preprocess.resize_mode == "squash"
    plan = make_plan(config, parse_topology("h100:8"))
    assert plan.facts.memory.total > 0


@pytest.mark.parametrize(
    ("argument", "message"), [("", "write ternary_from:MODEL"), (":runs/none", "runs/none: no such")]
)
def test_a_missing_model_is_named(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(f"ternary_from{argument}")
