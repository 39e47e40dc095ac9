from __future__ import annotations

import copy
import dataclasses
from typing import Any

import hypothesis.strategies
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import (
    config_from_hugging_face,
    hugging_face_config,
)
from tclip_jax.interop.hugging_face_preprocess import preprocess_from_hugging_face
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])


@pytest.mark.parametrize("hidden", [4304, 5461, 6144, 8191])
def test_any_width_of_the_mlp_survives_the_ratio(hidden: int) -> None:
    document = hugging_face_config(TINY)
    document["vision_config"]["intermediate_size"] = hidden
    config = config_from_hugging_face(document)
    assert int(config.vision.width * config.vision.mlp_ratio) == hidden


def test_images_of_one_size_in_every_form() -> None:
    """Sizes are numbers, lists or objects; crop_size is unused if `do_center_crop` is false."""
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
    # Another class crops only if it states so, and resizes both sides to a single number.
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


@pytest.mark.torch
@hypothesis.given(hypothesis.strategies.data())
@hypothesis.settings(max_examples=100)
def test_a_config_json_without_its_defaults_is_that_of_transformers(data: hypothesis.strategies.DataObject) -> None:
    """Any subset of the fields and towers may be omitted, or be in the older `…_dict` section."""
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


def test_both_activations_are_written_in_both_towers() -> None:
    for quick_gelu, name in ((True, "quick_gelu"), (False, "gelu")):
        written = hugging_face_config(dataclasses.replace(TINY, quick_gelu=quick_gelu))
        assert written["vision_config"]["hidden_act"] == written["text_config"]["hidden_act"] == name


def test_a_vocabulary_without_the_end_of_text_is_not_written() -> None:
    small = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, vocab_size=1000))
    with pytest.raises(
        ValueError, match=r"^text_cfg\.vocab_size is 1000: transformers' CLIPModel pools a text at token"
    ):
        hugging_face_config(small)
