"""The guess names what differs, for references that differ in one way; most are run by open_clip or transformers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.data.images import Preprocess, normalize
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import resize_positions
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.activations import activations_report, record
from tclip_jax.numerics.configurations import folder_recipe
from tclip_jax.numerics.golden import Recording, model_recipe
from tclip_jax.numerics.guess import guess
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.torch_side import build_torch, import_torch, load_torch, record_torch
from tclip_jax.numerics.weights import compare_taps
from tclip_jax.ternary import Quantizer

Batch = tuple[np.ndarray, np.ndarray]


def with_params(model: Model, path: str, edit: Any) -> Model:
    leaves = flatten_dict(jax.device_get(model.params), sep="/")
    return dataclasses.replace(model, params=unflatten_dict(leaves | {path: edit(np.array(leaves[path]))}, sep="/"))


def with_config(model: Model, **changes: Any) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


def against(model: Model, reference: Recording) -> Report:
    report = activations_report("title", model, reference)
    assert not report.passed
    return report


def in_open_clip(model: Model, batch: Batch) -> Recording:
    """The model run by open_clip, without what it states: the guess must do without."""
    return record_torch(build_torch(model), model.config, *batch)


@pytest.fixture
def folder(exported: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The model as a folder of transformers alone; tests may change its JSON files."""
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (tmp_path / "model.safetensors").symlink_to(exported / "model.safetensors")
    return tmp_path


def in_transformers(folder: pathlib.Path, model: Model, batch: Batch, **changes: Any) -> Recording:
    """The folder run by transformers, after these changes of both towers in its config.json."""
    document = json.loads((folder / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        document[tower] |= changes
    (folder / "config.json").write_text(json.dumps(document))
    return record_torch(load_torch(folder), model.config, *batch)._replace(made_by=folder_recipe(folder))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("quick", [True, False])
def test_another_activation(quick: bool, model: Model, batch: Batch) -> None:
    report = against(
        with_config(model, quick_gelu=quick), in_open_clip(with_config(model, quick_gelu=not quick), batch)
    )
    assert report.first == {"image": "image/blocks/0/mlp", "text": "text/blocks/0/mlp"}
    assert report.guess == f"the activation of the MLPs: the reference has quick_gelu {str(not quick).lower()}"


@pytest.mark.slow
@pytest.mark.torch
def test_an_activation_that_both_files_state(folder: pathlib.Path, model: Model, batch: Batch) -> None:
    report = against(model, in_transformers(folder, model, batch, hidden_act="quick_gelu"))
    assert report.configurations == {"quick_gelu": (False, True)}
    assert report.guess == "the activation of the MLPs: the reference has quick_gelu true"


@pytest.mark.slow
@pytest.mark.torch
def test_tanh_gelu(model: Model, batch: Batch) -> None:
    torch, module = import_torch(), build_torch(model)
    for block in (*module.visual.transformer.resblocks, *module.transformer.resblocks):
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    report = against(model, record_torch(module, model.config, *batch))
    assert "such as the tanh approximation of GELU: every MLP" in report.guess and ";" not in report.guess


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12, 1e-3])
def test_another_epsilon(epsilon: float, folder: pathlib.Path, model: Model, batch: Batch) -> None:
    report = against(model, in_transformers(folder, model, batch, layer_norm_eps=epsilon))
    assert report.configurations == {f"{tower}.norm_eps": (1e-5, epsilon) for tower in ("vision", "text")}
    assert report.guess == f"the epsilon of the LayerNorms: the reference has {epsilon:g}, ours is 1e-05"


@pytest.mark.slow
@pytest.mark.torch
def test_an_epsilon_that_no_file_states(model: Model, batch: Batch) -> None:
    torch, module = import_torch(), build_torch(model)
    for part in module.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-6
    report = against(model, record_torch(module, model.config, *batch))
    assert report.guess == "the epsilon of the LayerNorms: the reference has 1e-06, ours is 1e-05"


@pytest.mark.slow
@pytest.mark.torch
def test_another_interpolation_of_the_positions(model: Model, batch: Batch) -> None:
    torch = import_torch()
    stored = np.random.default_rng(1).standard_normal((1 + 16, 32), np.float32)  # of a model of 32x32 pixels
    grid = torch.from_numpy(stored[1:]).reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bilinear", align_corners=False)
    bilinear = np.concatenate([stored[:1], resized.permute(0, 2, 3, 1).reshape(4, 32).numpy()])
    path = "image/position_embedding"
    ours = with_params(model, path, lambda _: resize_positions(stored, (2, 2)))
    report = against(ours, in_open_clip(with_params(model, path, lambda _: bilinear), batch))
    assert report.first == {"image": "image/embedded"}
    assert report.guess == (
        "the position embedding, such as another interpolation to the image size: the patches differ, and not the class"
        " token (4 of 5 positions differ)"
    )


@pytest.mark.slow
@pytest.mark.torch
def test_positions_in_another_order(model: Model, batch: Batch) -> None:
    turned = with_params(model, "text/position_embedding", lambda positions: positions[::-1].copy())
    report = against(model, in_open_clip(turned, batch))
    assert report.guess == "the position embedding of the texts: 12 of 12 positions differ"
    doubled = with_params(model, "image/class_embedding", lambda token: 2 * token)
    assert "no patch differs" in against(model, in_open_clip(doubled, batch)).guess


@pytest.mark.slow
@pytest.mark.torch
def test_another_mean_and_std(model: Model, batch: Batch) -> None:
    """A reference with its own pipeline: the recording states pixels that its model did not get."""
    pixels, tokens = batch
    std, mean = np.float32(model.preprocess.std), np.float32(model.preprocess.mean)
    unscaled = 255 * (pixels * std + mean)
    theirs = np.asarray(normalize(unscaled, (0.5, 0.5, 0.5), (0.25, 0.5, 0.5)), np.float32)
    recording = record_torch(build_torch(model), model.config, theirs, tokens)._replace(pixels=pixels)
    report = against(model, recording)
    assert report.first == {"image": "image/patch_embedding"}
    assert report.guess == (
        "the mean and std of the pixels: the reference's are (0.500, 0.500, 0.500) and (0.250, 0.500, 0.500), ours"
        " (0.481, 0.458, 0.408) and (0.269, 0.261, 0.276)"
    )
    # Swapped channels are not another mean.
    recording = record_torch(build_torch(model), model.config, pixels[..., ::-1], tokens)._replace(pixels=pixels)
    assert against(model, recording).guess.startswith("the pixels (resize, crop, order of the channels)")
    ternary = dataclasses.replace(
        model, rules=ternary_rules([(r"image/patch_embedding/kernel", Quantizer(group=8))], Quantizer())
    )
    recording = record_torch(build_torch(ternary), model.config, theirs, tokens)._replace(pixels=pixels)
    assert against(ternary, recording).guess.startswith("the pixels (resize, crop")


@pytest.mark.slow
@pytest.mark.torch
def test_a_mean_that_both_files_state(folder: pathlib.Path, model: Model, batch: Batch) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5] * 3}))
    report = against(model, in_transformers(folder, model, batch))
    assert list(report.configurations) == ["preprocess.mean"] and not report.first
    assert report.guess == "the images are preprocessed differently; from equal pixels both models compute the same"


@pytest.mark.slow
@pytest.mark.torch
def test_a_folder_without_a_preprocessor_states_none(
    folder: pathlib.Path, model: Model, batch: Batch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "preprocessor_config.json").unlink()
    grey = dataclasses.replace(model, preprocess=Preprocess(16, mean=(0.5,) * 3))
    report = activations_report("title", grey, in_transformers(folder, model, batch))
    assert report.passed and not report.configurations
    assert caplog.messages == [
        f"{folder} has no preprocessor_config.json: assuming CLIP's preprocessing: bicubic resize of the shorter side"
        " and center crop to 16x16, mean (0.48145466, 0.4578275, 0.40821073), std (0.26862954, 0.26130258, 0.27577711)"
    ]


@pytest.mark.slow
@pytest.mark.torch
def test_no_causal_mask(model: Model, batch: Batch) -> None:
    open_text = dataclasses.replace(model.config.text, no_causal_mask=True)
    report = against(with_config(model, text=open_text), in_open_clip(model, batch))
    assert report.guess == "the causal mask: the reference has one"
    report = against(model, in_open_clip(with_config(model, text=open_text), batch))
    assert report.guess == "the causal mask: the reference has none"


@pytest.mark.slow
@pytest.mark.torch
def test_another_number_of_heads(model: Model, batch: Batch) -> None:
    vision = dataclasses.replace(model.config.vision, head_width=8)
    report = against(with_config(model, vision=vision), in_open_clip(model, batch))
    assert report.guess.startswith("the attention: the number of heads, the scale of the queries")
    # With what both state, the option is named too.
    stated = in_open_clip(model, batch)._replace(made_by=model_recipe(model))
    assert against(with_config(model, vision=vision), stated).configurations == {"vision.head_width": (8, 16)}


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("image/blocks/attention/qkv/kernel", "the weights of image/blocks/0/attention, or their order of queries"),
        ("text/blocks/mlp/fc2/kernel", "the weights of text/blocks/0/mlp, or their order of the layers"),
        ("image/projection/kernel", "the weights of image/projection"),
        ("text/token_embedding", "the token ids, or the weights of the token embedding"),
        ("text/ln_final/scale", "the token that text/ln_final pools, or the weights of that LayerNorm"),
    ],
)
def test_other_weights(path: str, cause: str, model: Model, batch: Batch) -> None:
    def first_layer(value: np.ndarray) -> np.ndarray:
        rows = (slice(0, 1),) if "/blocks/" in path else (...,)
        value[rows] *= np.float32(1.01)
        return value

    other = with_params(
        model, path if path in flatten_dict(model.params, sep="/") else f"{path}/embedding", first_layer
    )
    assert against(model, record(other, *batch)).guess.startswith(cause)


@pytest.mark.parametrize(
    ("tap", "cause"),
    [
        ("image/blocks/1", "the sum of the residual stream in image/blocks/1, such as a LayerScale"),
        ("text/embedding", "the L2 normalisation of text/embedding"),
        ("image/blocks/2/mlp", "the weights of image/blocks/2/mlp, or their order of the layers"),
    ],
)
def test_a_tap_that_no_weights_explain(tap: str, cause: str, model: Model, batch: Batch) -> None:
    recording = record(model, *batch)
    report = against(model, recording._replace(taps=recording.taps | {tap: 1.01 * recording.taps[tap]}))
    assert report.first == {tap.split("/")[0]: tap} and report.guess.startswith(cause)


def test_errors_that_add_up(model: Model, batch: Batch) -> None:
    """Of embeddings over budget when no tap is by itself."""
    recording = record(model, *batch)
    isolated = compare_taps(recording.taps, recording.taps)

    def rerun(*_: Any) -> Any:
        raise AssertionError("there is nothing to try")

    rounding = "rounding that adds up over the layers; compare with a larger --budget"
    assert guess(model, recording, isolated, 1e-5, {}, rerun) == rounding


def test_a_lower_precision(model: Model, batch: Batch) -> None:
    report = activations_report("title", model, record(model, *batch), dtype="bfloat16")
    assert report.guess.startswith("a lower precision of the products, such as bfloat16 or TF32")


def test_two_causes_are_two_guesses(model: Model, batch: Batch) -> None:
    other = with_params(with_config(model, quick_gelu=True), "text/position_embedding", lambda x: x[::-1].copy())
    report = against(model, record(other, *batch))
    assert report.guess == (
        "the activation of the MLPs: the reference has quick_gelu true; the position embedding of the texts: 12 of 12"
        " positions differ"
    )


def test_models_of_other_shapes_are_not_run(model: Model, batch: Batch) -> None:
    deeper = dataclasses.replace(model.config.vision, layers=4)
    reference = record(model, *batch)._replace(made_by=model_recipe(with_config(model, vision=deeper)))
    report = against(model, reference)
    assert report.configurations == {"vision.layers": (3, 4)} and not report.tables and not report.guess
    assert report.verdict == ("the models have different shapes, so no activation can be compared",)
