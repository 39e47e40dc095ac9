from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.presets import PRESETS, model_cfg, preprocess_cfg

LAYER_SCALES = st.none() | st.floats(1e-5, 1)
VISIONS = st.builds(
    lambda grid, patch, heads, head_width, **rest: VisionConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        width=heads * head_width,
        head_width=head_width,
        **rest,
    ),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    patch=st.integers(1, 40),
    heads=st.integers(1, 20),
    head_width=st.integers(1, 128),
    layers=st.integers(1, 48),
    mlp_ratio=st.floats(0.5, 8),
    ls_init_value=LAYER_SCALES,
    pool_type=st.sampled_from(["tok", "avg"]),
    no_ln_pre=st.booleans(),
    final_ln_after_pool=st.booleans(),
)
TEXTS = st.builds(
    lambda heads, head_width, **rest: TextConfig(heads=heads, width=heads * head_width, **rest),
    heads=st.integers(1, 20),
    head_width=st.integers(1, 128),
    context_length=st.integers(2, 256),
    layers=st.integers(1, 48),
    ls_init_value=LAYER_SCALES,
    pool_type=st.sampled_from(["argmax", "last"]),
    no_causal_mask=st.booleans(),
)


@given(st.builds(CLIPConfig, st.integers(1, 2048), VISIONS, TEXTS, st.booleans()))
def test_any_config_survives_open_clips_json(config: CLIPConfig) -> None:
    assert CLIPConfig.from_open_clip(json.loads(json.dumps(config.to_open_clip()))) == config


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("ViT-B-32", 151_277_313),
        ("ViT-B-16", 149_620_737),
        ("ViT-B-16-quickgelu", 149_620_737),
        ("ViT-L-14", 427_616_513),
        ("ViT-B-16-SigLIP", 203_155_970),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    shapes = param_shapes(CLIPConfig.from_open_clip(PRESETS[preset]))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.torch
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_presets_are_open_clips(preset: str) -> None:
    import open_clip

    assert CLIPConfig.from_open_clip(model_cfg(preset)) == CLIPConfig.from_open_clip(open_clip.get_model_config(preset))
    ours, theirs = preprocess_cfg(preset), vars(open_clip.transform.PreprocessCfg())
    if "SigLIP" in preset:
        theirs |= open_clip.get_pretrained_cfg(preset, "webli")
    assert ours == {key: theirs[key] for key in ours}


def test_tiny_preset_keeps_clips_vocabulary() -> None:
    config = CLIPConfig.from_open_clip(model_cfg("tiny"))
    assert (config.text.vocab_size, config.text.context_length) == (49408, 32)


def test_a_preset_is_a_fresh_copy() -> None:
    model_cfg("tiny")["vision_cfg"]["width"] = 1
    assert model_cfg("tiny")["vision_cfg"]["width"] == 64


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_json_file_of_open_clip_is_a_model(wrapped: bool, tmp_path: pathlib.Path) -> None:
    cfg = CLIPConfig.from_open_clip(PRESETS["ViT-L-14"]).to_open_clip()
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}} if wrapped else cfg))
    assert CLIPConfig.from_open_clip(model_cfg(str(path))) == CLIPConfig.from_open_clip(PRESETS["ViT-L-14"])
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        model_cfg(str(tmp_path / "absent.json"))


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'ViT-B16': the nearest is 'ViT-B-16'"):
        model_cfg("ViT-B16")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vison_cfg": {}}, "^model_cfg has no .*'vison_cfg': the nearest is 'vision_cfg'$"),
        ({"vision_cfg": {"imagesize": 32}}, "^vision_cfg has no .*'imagesize': the nearest is 'image_size'$"),
        ({"text_cfg": {"context": 77}}, "^text_cfg has no .*'context': the nearest is 'context_length'$"),
        ({"vision_cfg": {"image_size": 224, "patch_size": 225}}, "image size 224 is smaller than patch size 225"),
        ({"vision_cfg": {"width": 100}}, "vision width 100 is not divisible by head width 64"),
        ({"vision_cfg": {"pool_type": "max"}}, r"^vision_cfg\.pool_type is 'max': it must be .*tok.*avg"),
        ({"vision_cfg": {"layers": 0}}, r"^vision_cfg\.layers is 0: it must be at least 1$"),
        ({"text_cfg": {"width": 100}}, "text width 100 is not divisible by 8 heads"),
        ({"text_cfg": {"pool_type": "mean"}}, r"^text_cfg\.pool_type is 'mean': it must be .*argmax.*last"),
    ],
)
def test_an_impossible_model_is_one_clear_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CLIPConfig.from_open_clip({"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}} | changed)
    assert "\n" not in str(error.value)
