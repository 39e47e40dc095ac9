from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

import hypothesis.strategies
import pytest
from etils import epath

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face import hugging_face_config
from tclip_jax.interop.metadata import (
    config_from_hugging_face,
    from_hugging_face,
    from_name,
    from_open_clip,
    preprocess_from_hugging_face,
)
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_json_gives_the_model_it_was_written_from(preset: str) -> None:
    config = CLIPConfig.from_open_clip(PRESETS[preset])
    assert config_from_hugging_face(hugging_face_config(config)) == config
    assert from_name(preset) == (config, Preprocess(config.vision.image_size))


@pytest.mark.parametrize("hidden", [4304, 5461, 6144, 8191])
def test_any_width_of_the_mlp_survives_the_ratio(hidden: int) -> None:
    document = hugging_face_config(TINY)
    document["vision_config"]["intermediate_size"] = hidden
    config = config_from_hugging_face(document)
    assert int(config.vision.width * config.vision.mlp_ratio) == hidden


def test_preprocessing_is_the_inverse_of_export(tmp_path: pathlib.Path) -> None:
    for pixels in (
        Preprocess(32),
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bilinear"),
        Preprocess((32, 48), resize_mode="squash"),
    ):
        assert preprocess_from_hugging_face(pixels.to_hugging_face()) == pixels
    # transformers wrote plain numbers before, and writes one file for image and text now.
    old = Preprocess(32).to_hugging_face() | {"size": 32, "crop_size": 32}
    assert preprocess_from_hugging_face(old) == Preprocess(32)
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": old}))
    assert from_hugging_face(epath.Path(tmp_path)) == (TINY, Preprocess(32))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "siglip", "model_type is 'siglip'"),
        ("vision_config.hidden_act", None, "hidden_act is 'gelu' and 'quick_gelu': both towers"),
        ("vision_config.num_channels", 4, "vision_config.num_channels is 4: it must be 3"),
        ("vision_config", [1], r"vision_config is \[1\]: it must be a JSON object"),
        ("text_config.hidden_act", "quick_gelu", "hidden_act is 'gelu' and 'quick_gelu': both towers"),
        ("vision_config.hidden_act", "gelu_new", "'gelu_new'"),
        ("vision_config.layer_norm_eps", 1e-6, "vision_config.layer_norm_eps is 1e-06: it must be 1e-05"),
        ("text_config.eos_token_id", 3, "text_config.eos_token_id is 3: it must be 49407"),
        ("text_config.vocab_size", 1000, "text_config.eos_token_id is 49407, which a vocabulary of 1000 does not have"),
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
        ({"do_center_crop": False}, "give no images of one size"),
        ({"crop_size": 24}, "give no images of one size"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784.*: it must be 1/255"),
        ({"resample": 0}, "resample is 0: it must be 2 .* or 3"),
        ({"image_mean": [0.5]}, "not three numbers"),
        ({"size": {"longest_edge": 32}}, "size is .'longest_edge': 32.: it must be a number, shortest_edge alone, or"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "it must be a number, shortest_edge alone, or height"),
        ({"size": "32"}, "size is '32': it must be a number, shortest_edge alone, or"),
        ({"use_square_size": True}, "use_square_size is true"),
        ({"image_processor_type": "ViTImageProcessor", "resample": None}, "lacks resample, and only CLIPImageProc"),
    ],
)
def test_a_preprocessor_that_is_not_read(changed: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(Preprocess(32).to_hugging_face() | changed))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        from_hugging_face(epath.Path(tmp_path))


def test_images_of_one_size_in_every_form() -> None:
    """`do_center_crop` false makes crop_size unused; sizes are numbers, lists, or objects."""
    square, squashed = Preprocess(32), Preprocess(32, resize_mode="squash")
    both = {"height": 32, "width": 32}
    for fields, expected in (
        ({"size": 32, "crop_size": 32}, square),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, square),
        ({"size": both, "crop_size": both, "do_center_crop": True}, squashed),
        ({"size": both, "do_center_crop": False}, squashed),
        ({"size": both, "do_center_crop": False, "crop_size": 7}, squashed),
        ({"size": both, "do_center_crop": False, "crop_size": "any"}, squashed),
        ({"size": [32, 48], "do_center_crop": False}, Preprocess((32, 48), resize_mode="squash")),
        ({"size": 32, "crop_size": 32, "do_resize": None, "do_rescale": None, "do_normalize": None}, square),
        ({"size": 32, "crop_size": 32, "do_normalize": False}, Preprocess(32, (0.0,) * 3, (1.0,) * 3)),
    ):
        assert preprocess_from_hugging_face(fields) == expected, fields
    # Another class crops nothing unless it says so, and squashes to a number.
    other = {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 2, "image_mean": [0.5] * 3}
    assert preprocess_from_hugging_face(other | {"image_std": [0.5] * 3}) == Preprocess(
        32, (0.5,) * 3, (0.5,) * 3, "bilinear", "squash"
    )


@pytest.mark.torch
@hypothesis.given(hypothesis.strategies.data())
@hypothesis.settings(max_examples=60)
def test_a_preprocessor_without_its_defaults_is_that_of_transformers(data: hypothesis.strategies.DataObject) -> None:
    import transformers

    full = Preprocess(224).to_hugging_face()
    kept = {key: value for key, value in full.items() if data.draw(hypothesis.strategies.booleans(), label=key)}
    theirs = transformers.CLIPImageProcessor(**kept).to_dict()
    fields = ("size", "crop_size", "resample", "image_mean", "image_std", "do_center_crop", "do_normalize")
    assert preprocess_from_hugging_face(kept) == preprocess_from_hugging_face(
        {name: dict(theirs[name]) if isinstance(full[name], dict) else theirs[name] for name in fields}
    )
    assert preprocess_from_hugging_face(kept) == Preprocess(224)


def test_a_folder_without_a_preprocessor_says_what_is_assumed(tmp_path: pathlib.Path, caplog: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(TINY)))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert from_hugging_face(epath.Path(tmp_path)) == (TINY, Preprocess(32))
    assert f"{tmp_path} has no preprocessor_config.json: assumed are CLIPImageProcessor's defaults" in caplog.text


@pytest.mark.torch
@hypothesis.given(hypothesis.strategies.data())
@hypothesis.settings(max_examples=100)
def test_a_config_json_without_its_defaults_is_that_of_transformers(data: hypothesis.strategies.DataObject) -> None:
    """Any subset of the fields may be left out, towers too, and stand in the older `…_dict`."""
    import transformers

    def draw(section: dict[str, Any]) -> dict[str, Any]:
        return {key: section[key] for key in section if data.draw(hypothesis.strategies.booleans(), label=key)}

    whole = transformers.CLIPConfig().to_dict()
    other = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100}
    document = draw({key: value for key, value in whole.items() if not key.endswith("_config")})
    for name in ("vision_config", "text_config"):
        for form in data.draw(
            hypothesis.strategies.sets(hypothesis.strategies.sampled_from(("", "_dict"))), label=name
        ):
            document[name + form] = draw(whole[name] | data.draw(hypothesis.strategies.sampled_from(({}, other))))
    completed = transformers.CLIPConfig.from_dict(copy.deepcopy(document)).to_dict()
    ours = config_from_hugging_face(document)
    assert ours == config_from_hugging_face(completed)
    text, vision = completed["text_config"], completed["vision_config"]
    assert (ours.embed_dim, ours.text.layers, ours.vision.layers, ours.vision.heads, ours.quick_gelu) == (
        completed["projection_dim"],
        text["num_hidden_layers"],
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        True,
    )


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
    assert from_name(str(path)) == (TINY, Preprocess(32))
    path.write_text(json.dumps({"model_cfg": PRESETS["tiny"], "preprocess_cfg": {"interpolation": "bilinear"}}))
    assert from_name(str(path)) == (TINY, Preprocess(32, interpolation="bilinear"))
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 1}}))
    with pytest.raises(ValueError, match=r"model\.json: model_cfg lacks 'vision_cfg'"):
        from_name(str(path))
    with pytest.raises(ValueError, match="the nearest is 'ViT-B-16'"):
        from_name("ViT-B-17")
