"""The first tap over budget is the one with the bug, for bugs that the tests introduce."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.activations import activations_report, record
from tclip_jax.numerics.golden import Recording
from tclip_jax.numerics.torch_side import build_torch, load_torch, record_torch
from tclip_jax.ternary import Quantizer

Batch = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def reference(model: Model, batch: Batch) -> Recording:
    """A recording of the model in PyTorch, without the bugs that the tests introduce in JAX."""
    pytest.importorskip("torch")
    return record_torch(build_torch(model), model.config, *batch)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Any], None]]:
    """Replace a function of the model, and clear the compilation caches before and after."""

    def replace(name: str, function: Any) -> None:
        monkeypatch.setattr(f"tclip_jax.models.transformer.{name}", function)
        jax.clear_caches()

    yield replace
    jax.clear_caches()


def first_over(model: Model, reference: Recording) -> list[str]:
    report = activations_report("title", model, reference)
    assert report.passed == (not report.first) == (not report.guess)
    return [report.first.get(tower, "none") for tower in ("image", "text")]


def with_params(model: Model, path: str, edit: Any) -> Model:
    leaves = flatten_dict(jax.device_get(model.params), sep="/")
    return dataclasses.replace(model, params=unflatten_dict(leaves | {path: edit(np.array(leaves[path]))}, sep="/"))


def test_a_model_against_itself_is_identical(model: Model, batch: Batch) -> None:
    report = activations_report("title", model, record(model, *batch))
    assert report.passed and {row.max_abs for rows in report.tables.values() for row in rows} == {0}


@pytest.mark.torch
def test_the_same_weights_in_open_clip(model: Model, reference: Recording) -> None:
    report = activations_report("title", model, reference)
    assert report.passed and len(report.tables["cumulative"]) == len(report.tables["isolated"]) == 25
    assert max(row.relative for rows in report.tables.values() for row in rows) <= 1e-5
    assert report.facts["images classified alike"] == "100%" and "TF32" in str(report.facts)


@pytest.mark.torch
@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_a_folder_that_the_library_reads_itself(
    model: Model, batch: Batch, exported: pathlib.Path, tmp_path: pathlib.Path, library: str
) -> None:
    folder = exported
    if library == "transformers":
        folder = tmp_path
        for file in ("config.json", "model.safetensors"):
            (folder / file).symlink_to(exported / file)
    recording = record_torch(load_torch(folder), model.config, *batch)
    assert recording.facts["run by"].startswith(library)
    report = activations_report("title", model, recording)
    assert max(row.relative for rows in report.tables.values() for row in rows) <= 1e-5


@pytest.mark.slow
@pytest.mark.torch
def test_ternary_weights_and_their_dequantised_copy(model: Model, batch: Batch) -> None:
    ternary = dataclasses.replace(model, rules=ternary_rules("Q-ALL", Quantizer(group=8)))
    recording = record_torch(build_torch(ternary), model.config, *batch)
    assert first_over(ternary, recording) == ["none", "none"]
    assert first_over(model, recording) == ["image/blocks/0/attention", "text/token_embedding"]


@pytest.mark.torch
def test_tanh_gelu(model: Model, reference: Recording, plant: Callable[[str, Any], None]) -> None:
    plant("activate", lambda x, activation: jax.nn.gelu(x))
    assert first_over(model, reference) == ["image/blocks/0/mlp", "text/blocks/0/mlp"]


@pytest.mark.torch
def test_layer_norm_epsilon(model: Model, reference: Recording, plant: Callable[[str, Any], None]) -> None:
    plant("layer_norm", lambda name, epsilon: nn.LayerNorm(epsilon=1e-6, name=name))
    # The image tower's activations have a variance of about 1, which hides the difference of the epsilons.
    assert first_over(model, reference)[1] == "text/blocks/0/attention"


@pytest.mark.torch
def test_swapped_query_and_key(model: Model, reference: Recording) -> None:
    def swap(kernel: np.ndarray) -> np.ndarray:
        q, k, v = np.split(kernel[1], 3, axis=-1)
        kernel[1] = np.concatenate([k, q, v], axis=-1)
        return kernel

    assert first_over(with_params(model, "image/blocks/attention/qkv/kernel", swap), reference) == [
        "image/blocks/1/attention",
        "none",
    ]


@pytest.mark.torch
def test_one_scaled_weight(model: Model, reference: Recording) -> None:
    scaled = with_params(model, "image/blocks/mlp/fc1/kernel", lambda w: w * np.float32([1, 1, 1.01])[:, None, None])
    assert first_over(scaled, reference) == ["image/blocks/2/mlp", "none"]


@pytest.mark.torch
def test_missing_causal_mask(model: Model, reference: Recording) -> None:
    text = dataclasses.replace(model.config.text, no_causal_mask=True)
    bidirectional = dataclasses.replace(model, config=dataclasses.replace(model.config, text=text))
    assert first_over(bidirectional, reference) == ["none", "text/blocks/0/attention"]


def test_a_nan_is_over_budget(model: Model, batch: Batch) -> None:
    broken = with_params(model, "text/blocks/mlp/fc2/bias", lambda bias: bias * np.float32([1, np.nan])[:, None])
    report = activations_report("title", broken, record(model, *batch))
    assert report.first == {"text": "text/blocks/1/mlp"} and not report.passed
    assert report.guess.startswith("numbers that are not finite, first in text/blocks/1/mlp")


def test_bfloat16_is_not_float32(model: Model, batch: Batch) -> None:
    report = activations_report("title", model, record(model, *batch), dtype="bfloat16")
    assert not report.passed
    assert activations_report("title", model, record(model, *batch), dtype="bfloat16", budget=0.5).passed


def test_another_model_is_refused(model: Model, batch: Batch) -> None:
    recording = record(model, *batch)
    vision = dataclasses.replace(model.config.vision, layers=4)
    deeper = dataclasses.replace(model, config=dataclasses.replace(model.config, vision=vision))
    stacked = flatten_dict(model.params, sep="/")
    params = {k: np.concatenate([v, v[:1]]) if k.startswith("image/blocks") else v for k, v in stacked.items()}
    with pytest.raises(ValueError, match="only one of the models has image/blocks/3/attention"):
        activations_report("title", dataclasses.replace(deeper, params=unflatten_dict(params, sep="/")), recording)
    with pytest.raises(ValueError, match=r"the reference was run on pixels and tokens of shapes .*the model takes"):
        activations_report("title", model, recording._replace(tokens=recording.tokens[:, :5]))
