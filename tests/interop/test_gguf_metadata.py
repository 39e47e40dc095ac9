from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import HALF_MEAN, HALF_STD, Preprocess
from tclip_jax.interop import hugging_face
from tclip_jax.interop.gguf_metadata import GgufModel, from_metadata, gguf_table, to_metadata
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

B16 = CLIPConfig.from_open_clip(PRESETS["ViT-B-16"])

# clip.cpp abbreviates the names of transformers' CLIPModel.
WORDS = {
    "vision_model.": "v.",
    "text_model.": "t.",
    "embeddings.": "",
    "embedding": "embd",
    "encoder.layers": "blk",
    "pre_layrnorm": "pre_ln",
    "post_layernorm": "post_ln",
    "final_layer_norm": "post_ln",
    "layer_norm": "ln",
    "self_attn.": "attn_",
    "q_proj.": "q.",
    "k_proj.": "k.",
    "v_proj.": "v.",
    "out_proj.": "out.",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}


def shapes_of(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}


def test_names_are_clip_cpps_abbreviations_of_clip_models() -> None:
    expected = set()
    for entry in hugging_face.hugging_face_table(B16):
        name = entry.key
        for word, short in WORDS.items():
            name = name.replace(word, short)
        expected.add(name)
    entries = gguf_table(shapes_of(B16))
    assert {entry.name for entry in entries} == expected - {"logit_scale"}
    assert len(entries) == 397


def test_views_of_one_parameter_cover_it_once() -> None:
    shapes = shapes_of(CLIPConfig.from_open_clip(PRESETS["tiny"]))
    covered = {path: np.zeros(shape, np.int8) for path, shape in shapes.items() if path != "logit_scale"}
    for entry in gguf_table(shapes):
        entry.view(covered[entry.path])[...] += 1
    assert all((count == 1).all() for count in covered.values())


def test_a_view_has_its_outputs_first() -> None:
    shapes = shapes_of(CLIPConfig.from_open_clip(PRESETS["tiny"]))
    views = {entry.name: entry for entry in gguf_table(shapes)}
    qkv = np.arange(3 * 64 * 192).reshape(3, 64, 192)
    np.testing.assert_array_equal(views["v.blk.2.attn_k.weight"].view(qkv), qkv[2, :, 64:128].T)
    patches = np.arange(8 * 8 * 3 * 64).reshape(8, 8, 3, 64)
    assert views["v.patch_embd.weight"].view(patches)[5, 2, 3, 4] == patches[3, 4, 2, 5]


def as_read(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata with the float32 values that a file returns."""
    read: dict[str, Any] = {}
    for key, value in metadata.items():
        if isinstance(value, tuple):
            read[key] = np.asarray(value, np.float32)
        else:
            read[key] = float(np.float32(value)) if isinstance(value, float) else value
    return read


@pytest.mark.parametrize("preset", [name for name in PRESETS if "SigLIP" not in name])
@pytest.mark.parametrize("stats", [{}, {"mean": HALF_MEAN, "std": HALF_STD}, {"mean": (0.1, 0.2, 0.3)}])
def test_every_preset_comes_back(preset: str, stats: dict[str, Any]) -> None:
    config = CLIPConfig.from_open_clip(PRESETS[preset])
    model = GgufModel(config, Preprocess(config.vision.image_size, **stats), 4.5)
    assert from_metadata(as_read(to_metadata(model, "tq1_0"))) == model


@pytest.mark.parametrize(
    ("width", "ratio", "hidden"), [(1408, 4.3637, 6144), (1664, 4.9231, 8192), (1152, 3.7362, 4304)]
)
def test_mlp_ratios_of_large_models_come_back_as_their_hidden_sizes(width: int, ratio: float, hidden: int) -> None:
    vision = dataclasses.replace(B16.vision, width=width, mlp_ratio=ratio)
    model = GgufModel(dataclasses.replace(B16, vision=vision), Preprocess(224), 0.0)
    metadata = as_read(to_metadata(model, "tq2_0"))
    assert metadata["clip.vision.feed_forward_length"] == hidden
    assert int(width * from_metadata(metadata).config.vision.mlp_ratio) == hidden


@pytest.mark.slow
def test_every_hidden_size_has_a_ratio() -> None:
    metadata = as_read(to_metadata(GgufModel(B16, Preprocess(224), 0.0), "tq1_0"))
    for hidden in range(1, 3000, 7):
        config = from_metadata(metadata | {"clip.text.feed_forward_length": hidden}).config
        assert int(config.text.width * config.text.mlp_ratio) == hidden


def test_files_of_clip_cpp_state_no_logit_scale(caplog: pytest.LogCaptureFixture) -> None:
    """clip.cpp's converter omits logit_scale: the reader uses OpenAI's value, with a warning."""
    metadata = as_read(to_metadata(GgufModel(B16, Preprocess(224), 3.0), "tq2_0"))
    assert from_metadata(metadata).logit_scale == 3.0 and not caplog.messages
    del metadata["clip.logit_scale"]
    assert np.exp(from_metadata(metadata).logit_scale) == pytest.approx(100)
    assert "the metadata lack clip.logit_scale: using ln(100)" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clip.has_vision_encoder", False, "it has no vision encoder: only a CLIP with two towers can be read"),
        ("clip.logit_scale", np.nan, "clip.logit_scale is nan: its magnitude must be at most 32768"),
        ("clip.logit_scale", 1e300, "clip.logit_scale is 1e"),
        ("clip.logit_scale", 4, "clip.logit_scale is int: it must be float"),
        ("clip.use_gelu", None, "the metadata lack clip.use_gelu"),
        ("clip.use_gelu", 1, "clip.use_gelu is int: it must be bool"),
        ("clip.text.block_count", True, "clip.text.block_count is bool: it must be int"),
        ("clip.text.block_count", 0, "clip.text.block_count is 0: it must be from 1 to 32768"),
        ("clip.text.block_count", 30000, "clip.text.block_count is 30000: at most 1024 are read"),
        ("clip.vision.image_size", 4_000_000_000, "clip.vision.image_size is 4000000000: it must be from 1 to 32768"),
        ("clip.vision.image_size", 15, "image size 15 is smaller than patch size 16"),
        ("clip.vision.attention.head_count", 5, r"attention.head_count of 8 \(text\) or 5 \(vision\) does not divide"),
        ("clip.text.attention.head_count", 1000, r"attention.head_count of 1000 \(text\)"),
        ("clip.text.attention.layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06: it must be 1e-05"),
        ("clip.text.attention.layer_norm_epsilon", np.nan, "layer_norm_epsilon is nan"),
        ("clip.vision.projection_dim", 41, "projection_dim is 512 for text and 41 for images: they must agree"),
        (
            "clip.vision.image_mean",
            np.zeros(10**6, np.float32),
            "clip.vision.image_mean must hold three finite FLOAT32",
        ),
        ("clip.vision.image_mean", np.zeros(3, np.int32), "clip.vision.image_mean must hold three finite FLOAT32"),
        ("clip.vision.image_std", np.float32([1, 1, np.inf]), "clip.vision.image_std must hold three finite FLOAT32"),
        ("clip.vision.image_std", np.zeros(3, np.float32), "with std above 0"),
        ("tokenizer.ggml.tokens", ["!"] * 300, "tokenizer.ggml.tokens is not CLIP's vocabulary"),
        ("tokenizer.ggml.tokens", ["!"] * 49409, "a vocabulary of 49409 tokens: CLIP's has 1 to 49408"),
        ("tokenizer.ggml.tokens", np.zeros(3), "tokenizer.ggml.tokens is ndarray: it must be list"),
    ],
)
def test_metadata_that_cannot_be_are_refused(key: str, value: Any, message: str) -> None:
    metadata = as_read(to_metadata(GgufModel(B16, Preprocess(224), 0.0), "tq1_0")) | {key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(ValueError, match=message) as error:
        from_metadata(metadata)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("tower", "changes", "message"),
    [
        ("vision", {"pool_type": "avg"}, "vision_cfg.pool_type is 'avg': a GGUF of CLIP can only have 'tok'"),
        ("vision", {"no_ln_pre": True}, "vision_cfg.no_ln_pre is True"),
        ("vision", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value is 0.1"),
        ("vision", {"image_size": (224, 240)}, r"vision_cfg.image_size is \(224, 240\)"),
        ("text", {"pool_type": "last"}, "text_cfg.pool_type is 'last'"),
        ("text", {"no_causal_mask": True}, "text_cfg.no_causal_mask is True"),
        ("text", {"vocab_size": 50000}, "a vocabulary of 50000 tokens: CLIP's has 1 to 49408"),
    ],
)
def test_a_model_that_the_keys_cannot_describe_is_refused(tower: str, changes: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(B16, **{tower: dataclasses.replace(getattr(B16, tower), **changes)})
    with pytest.raises(ValueError, match=message):
        to_metadata(GgufModel(config, Preprocess(224), 0.0), "tq1_0")


@pytest.mark.parametrize(
    ("pixels", "option"),
    [
        (Preprocess(240), "size"),
        (Preprocess(224, resize_mode="squash"), "resize_mode"),
        (Preprocess(224, interpolation="bilinear"), "interpolation"),
    ],
)
def test_images_that_the_keys_cannot_describe_are_refused(pixels: Preprocess, option: str) -> None:
    with pytest.raises(ValueError, match=f"preprocess_cfg.{option} is .*: a GGUF of CLIP can only have"):
        to_metadata(GgufModel(B16, pixels, 0.0), "tq1_0")
