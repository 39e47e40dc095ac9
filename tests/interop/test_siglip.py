"""SigLIP against transformers' SiglipModel: configuration, weights in both directions, embeddings and gradients."""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts.pack import pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import tokenizer_of
from tclip_jax.inference.model import Model
from tclip_jax.interop.checkpoints import open_checkpoint, resize_positions
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face import from_hugging_face, to_hugging_face
from tclip_jax.interop.hugging_face_config import config_from_hugging_face, hugging_face_config
from tclip_jax.interop.open_clip import from_open_clip, to_open_clip
from tclip_jax.losses.contrastive import sigmoid_loss
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.numerics.activations import activations_report
from tclip_jax.numerics.torch_side import record_torch
from tclip_jax.ternary import Quantizer

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
DOCUMENT: dict[str, Any] = {
    "model_type": "siglip",
    "vision_config": SMALL | {"image_size": 24, "patch_size": 8},
    "text_config": SMALL | {"vocab_size": 99, "max_position_embeddings": 7, "projection_size": 32},
}
CONFIG = config_from_hugging_face(DOCUMENT)


@pytest.fixture(scope="module")
def module() -> Any:
    """A small SiglipModel whose weights are all away from 0 and 1."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    text = transformers.SiglipTextConfig(**DOCUMENT["text_config"], **ends)
    vision = transformers.SiglipVisionConfig(**DOCUMENT["vision_config"])
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def params(module: Any) -> dict[str, Any]:
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    return from_open_clip(from_hugging_face(state, CONFIG), CONFIG)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((4, 24, 24, 3), np.float32), rng.integers(0, 99, (4, 7), np.int32)


def test_the_configuration_goes_to_transformers_and_back() -> None:
    assert config_from_hugging_face(hugging_face_config(CONFIG)) == CONFIG
    assert CLIPConfig.from_open_clip(CONFIG.to_open_clip()) == CONFIG
    assert (CONFIG.vision.approximate, CONFIG.text.approximate, CONFIG.text.norm_eps) == ("tanh", "tanh", 1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "siglip2"}, "^model_type is 'siglip2', a NaFlex model"),
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head is false: only models with attention pooling"),
        ({"text_config": SMALL | {"projection_size": 33, "hidden_size": 34}}, "vision_cfg has no projection: width 32"),
        ({"vision_config": SMALL | {"hidden_act": "relu"}}, "hidden_act is 'gelu_pytorch_tanh' and 'relu'"),
    ],
)
def test_other_models_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hugging_face(DOCUMENT | changed)


def test_texts_are_refused_without_their_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenized by 'SiglipTokenizer', which is not stored with it"):
        tokenizer_of(CONFIG.text.context_length, CONFIG.text.hf_tokenizer_name)


@pytest.mark.torch
def test_weights_go_to_transformers_and_back(module: Any, params: dict[str, Any]) -> None:
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(CONFIG), sep="/").items()}
    assert {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()} == shapes
    written = to_hugging_face(to_open_clip(params, CONFIG), CONFIG)
    theirs = module.state_dict()
    assert written.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(np.asarray(written[key]), value.numpy())


@pytest.mark.torch
def test_embeddings_and_gradients(module: Any, params: dict[str, Any], batch: tuple[np.ndarray, np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    pixels, tokens = batch
    module.zero_grad()
    theirs = module(
        pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        input_ids=torch.from_numpy(tokens).long(),
        return_loss=True,
    )
    theirs.loss.backward()
    grads = {name: value.grad.numpy() for name, value in module.named_parameters()}
    expected = flatten_dict(from_open_clip(from_hugging_face(grads, CONFIG), CONFIG), sep="/")

    def loss(params: dict[str, Any]) -> tuple[jax.Array, Any]:
        image, text, scale = CLIP(CONFIG).apply({"params": params}, pixels, tokens)
        return sigmoid_loss(image, text, scale, params["logit_bias"]), (image, text)

    with jax.default_matmul_precision("highest"):
        (value, (image, text)), ours = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(image, theirs.image_embeds.detach(), atol=1e-5)
    np.testing.assert_allclose(text, theirs.text_embeds.detach(), atol=1e-5)
    np.testing.assert_allclose(value, theirs.loss.item(), rtol=1e-5)
    largest = max(np.abs(each).max() for each in expected.values())
    for path, gradient in flatten_dict(ours, sep="/").items():
        error = np.abs(gradient - expected[path]).max() / max(np.abs(expected[path]).max(), 1e-3 * largest)
        assert error <= 1e-4, (path, error)


@pytest.mark.torch
@pytest.mark.parametrize("image_size", [None, 40])
def test_a_folder_is_read(image_size: int | None, module: Any, params: dict[str, Any], tmp_path: pathlib.Path) -> None:
    module.save_pretrained(tmp_path)
    mean = {"size": {"height": 24, "width": 24}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = {"image_processor_type": "SiglipImageProcessor", **mean}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    checkpoint = open_checkpoint(tmp_path, image_size=image_size)
    assert checkpoint.preprocess.resize_mode == "squash" and checkpoint.preprocess.mean == (0.5, 0.5, 0.5)
    size = (image_size or 24,) * 2
    assert checkpoint.config.vision.image_size == size and checkpoint.preprocess.size == size
    ours = flatten_dict(jax.tree.map(np.asarray, checkpoint.params), sep="/")
    for path, value in flatten_dict(params, sep="/").items():
        if image_size and path == "image/position_embedding":
            assert ours[path].shape == (25, 32)
            continue
        np.testing.assert_array_equal(ours[path], value)


@pytest.mark.torch
def test_activations_are_those_of_transformers(module: Any, params: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((2, 24, 24, 3), np.float32)
    recording = record_torch(module, CONFIG, pixels, rng.integers(0, 99, (2, 7), np.int32))
    report = activations_report("siglip", Model(CONFIG, Preprocess(24), params), recording)
    assert report.passed and len(report.tables["isolated"]) == 22, report.verdict


@pytest.mark.torch
@pytest.mark.parametrize(("formats", "message"), [("gguf-tq2_0", "vision_cfg"), ("torch", "vision_cfg.class_token")])
def test_formats_that_cannot_hold_it_say_so(
    formats: str, message: str, params: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    packed = pack_params(params, ternary_rules("Q-ALL", Quantizer(group=16)))
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "out", config=CONFIG, preprocess=Preprocess(24), params=packed, formats=(formats,))
    assert not any(tmp_path.iterdir())


@pytest.mark.torch
def test_an_export_is_transformers_own(module: Any, params: dict[str, Any], tmp_path: pathlib.Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exported = export_model(
        tmp_path / "out", config=CONFIG, preprocess=Preprocess(24, resize_mode="squash"), params=params, formats=("hf",)
    )
    assert any("no tokenizer is written" in note for note in exported.notes)
    again = transformers.SiglipModel.from_pretrained(tmp_path / "out")
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match="open_clip builds SigLIP's image towers by their names in timm"):
        export_model(tmp_path / "b", config=CONFIG, preprocess=Preprocess(24), params=params, formats=("open_clip",))


@pytest.mark.torch
@pytest.mark.parametrize("side", [13, 14, 16, 27])
@pytest.mark.parametrize("grid", [(7, 7), (15, 15), (24, 24), (32, 32), (20, 9)])
def test_positions_are_resized_as_timm_and_open_clip_do(side: int, grid: tuple[int, int]) -> None:
    """open_clip's towers of timm are resized by timm, its own by open_clip; both with antialiasing, at any factor."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from open_clip.model import resize_pos_embed

    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((1 + side * side, 64), np.float32)
    model = timm.create_model("test_vit", img_size=side, patch_size=1, class_token=False, global_pool="avg")
    model.pos_embed = torch.nn.Parameter(torch.from_numpy(embedding[None, 1:]))
    model.set_input_size(grid)  # as open_clip's `force_image_size`
    np.testing.assert_allclose(
        resize_positions(embedding[1:], grid, False), model.pos_embed[0].detach().numpy(), atol=1e-5
    )
    state = {"visual.positional_embedding": torch.from_numpy(embedding)}
    resize_pos_embed(state, types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=grid)))
    np.testing.assert_allclose(resize_positions(embedding, grid), state["visual.positional_embedding"], atol=1e-5)
