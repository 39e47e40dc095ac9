from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from etils import epath

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import (
    config_from_hugging_face,
    hugging_face_config,
)
from tclip_jax.interop.hugging_face_preprocess import preprocess_from_hugging_face
from tclip_jax.interop.metadata import from_hugging_face, from_name, from_open_clip
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_json_gives_the_model_it_was_written_from(preset: str) -> None:
    config = CLIPConfig.from_open_clip(PRESETS[preset])
    back = config_from_hugging_face(hugging_face_config(config))
    vision, text = config.vision, config.text
    # A config.json has the hidden sizes, not the ratios, and does not name the tokenizer of open_clip.
    assert int(back.vision.width * back.vision.mlp_ratio) == int(vision.width * vision.mlp_ratio)
    assert int(back.text.width * back.text.mlp_ratio) == int(text.width * text.mlp_ratio)
    vision = dataclasses.replace(vision, mlp_ratio=back.vision.mlp_ratio)
    name = back.text.hf_tokenizer_name
    text = dataclasses.replace(text, mlp_ratio=back.text.mlp_ratio, hf_tokenizer_name=name)
    assert back == dataclasses.replace(config, vision=vision, text=text)
    pixels = Preprocess(config.vision.image_size)
    if "SigLIP" not in preset:
        assert from_name(preset) == (config, pixels, True)
        return
    pixels = dataclasses.replace(pixels, mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="squash")
    assert from_name(preset) == (config, pixels, False)


def test_preprocessing_is_the_inverse_of_export(tmp_path: pathlib.Path) -> None:
    for pixels in (
        Preprocess(32),
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bilinear"),
        Preprocess((32, 48), resize_mode="squash"),
    ):
        assert preprocess_from_hugging_face(pixels.to_hugging_face()) == pixels
    # Old versions of transformers write plain numbers; new versions write one file for images and texts.
    old = Preprocess(32).to_hugging_face() | {"size": 32, "crop_size": 32}
    assert preprocess_from_hugging_face(old) == Preprocess(32)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": old}))
    assert from_hugging_face(epath.Path(tmp_path)) == (TINY, Preprocess(32), False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "siglip2", "model_type is 'siglip2', a NaFlex model"),
        ("vision_config.hidden_act", None, "hidden_act is 'gelu' and 'quick_gelu': both towers"),
        ("vision_config.num_channels", 4, "vision_config.num_channels is 4: it must be 3"),
        ("vision_config", [1], r"vision_config is \[1\]: it must be a JSON object"),
        ("text_config.hidden_act", "quick_gelu", "hidden_act is 'gelu' and 'quick_gelu': both towers"),
        ("vision_config.hidden_act", "relu", "hidden_act is 'gelu' and 'relu': both towers"),
        ("vision_config.layer_norm_eps", -1e-6, "norm_eps is -1e-06: it must be above 0"),
        ("text_config.eos_token_id", 3, "text_config.eos_token_id is 3: it must be 49407"),
        ("text_config.vocab_size", 1000, "text_config.eos_token_id is 49407: it must be below the vocab_size, 1000"),
        ("vision_config.num_attention_heads", 0, "not the config of a CLIPModel"),
        ("vision_config.num_attention_heads", 24, "vision_config.hidden_size is 64: it is not divisible by 24 heads"),
        ("vision_config.intermediate_size", 10**400, "not the config of a CLIPModel"),
        ("text_config.hidden_size", "wide", "not the config of a CLIPModel"),
    ],
)
def test_a_config_json_that_is_not_read(path: str, value: Any, message: str, tmp_path: pathlib.Path) -> None:
    document = hugging_face_config(TINY)
    *parents, key = path.split(".")
    section = document[parents[0]] if parents else document
    section.pop(key)
    if value is not None:
        section[key] = value
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"/config\.json: .*{message}"):
        from_hugging_face(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_center_crop": False}, "the images have no fixed size"),
        ({"crop_size": 24}, "and crop_size 24 differ: they must be equal"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784.*: it must be 1/255"),
        ({"resample": 0}, "resample is 0: it must be 2 .* or 3"),
        ({"image_mean": [0.5]}, "not three numbers"),
        ({"size": {"longest_edge": 32}}, "size is .'longest_edge': 32.: it must be a number, shortest_edge alone, or"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "it must be a number, shortest_edge alone, or height"),
        ({"size": "32"}, "size is '32': it must be a number, shortest_edge alone, or"),
        ({"use_square_size": True}, "use_square_size is true"),
        (
            {"image_processor_type": "ViTImageProcessor", "resample": None},
            "lacks resample: only for CLIPImageProcessor",
        ),
    ],
)
def test_a_preprocessor_that_is_not_read(changed: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(Preprocess(32).to_hugging_face() | changed))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        from_hugging_face(epath.Path(tmp_path))


def test_a_folder_without_a_preprocessor_has_clips_default(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert from_hugging_face(epath.Path(tmp_path)) == (TINY, Preprocess(32), True)


def test_metadata_that_are_no_objects(tmp_path: pathlib.Path) -> None:
    folder = epath.Path(tmp_path)
    for document, message in (
        ({"model_cfg": None}, "model_cfg is None: it must be a JSON object"),
        ({"model_cfg": PRESETS["tiny"], "preprocess_cfg": [1]}, r"preprocess_cfg is \[1\]: it must be a JSON object"),
    ):
        (folder / "open_clip_config.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=rf"/open_clip_config\.json: {message}"):
            from_open_clip(folder)
        with pytest.raises(ValueError, match=rf"/open_clip_config\.json: {message}"):
            from_name(str(folder / "open_clip_config.json"))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": PRESETS["tiny"]}))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}))
    with pytest.raises(ValueError, match=r"/config\.json has hidden_act gelu, quick_gelu, but open_clip_config\.json"):
        from_open_clip(folder)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (folder / "processor_config.json").write_text('{"image_processor": null}')
    with pytest.raises(
        ValueError, match=r"/processor_config\.json: the preprocessing is None: it must be a JSON object"
    ):
        from_hugging_face(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{folder}/config\.json is not JSON"):
        from_hugging_face(folder)


def test_a_model_cfg_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(PRESETS["tiny"]))
    assert from_name(str(path)) == (TINY, Preprocess(32), True)
    path.write_text(json.dumps({"model_cfg": PRESETS["tiny"], "preprocess_cfg": {"interpolation": "bilinear"}}))
    assert from_name(str(path)) == (TINY, Preprocess(32, interpolation="bilinear"), False)
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 1}}))
    with pytest.raises(ValueError, match=r"model\.json: model_cfg lacks 'vision_cfg'"):
        from_name(str(path))
    with pytest.raises(ValueError, match="the nearest is 'ViT-B-16'"):
        from_name("ViT-B-17")
