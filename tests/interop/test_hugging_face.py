from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tclip_jax.interop.hugging_face import from_hugging_face, hugging_face_table, to_hugging_face
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.open_clip import open_clip_table, to_open_clip
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])
Draw = Callable[[CLIPConfig], dict[str, Any]]


def test_import_is_the_inverse_of_export(random_params: Draw) -> None:
    state = to_open_clip(random_params(TINY), TINY)
    back = from_hugging_face(to_hugging_face(state, TINY), TINY)
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.torch
@pytest.mark.parametrize(("preset", "keys"), [("tiny", 94), ("ViT-B-16-quickgelu", 398), ("ViT-L-14", 590)])
def test_clip_model_has_the_same_keys_and_shapes(preset: str, keys: int) -> None:
    import torch
    import transformers

    config = CLIPConfig.from_open_clip(PRESETS[preset])
    with torch.device("meta"):
        theirs = transformers.CLIPModel(transformers.CLIPConfig.from_dict(hugging_face_config(config))).state_dict()
    # Arrays without storage: only names and shapes matter.
    state = {entry.key: np.broadcast_to(np.float32(0), entry.shape) for entry in open_clip_table(config)}
    ours = to_hugging_face(state, config)
    assert {key: value.shape for key, value in ours.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    assert len(ours) == keys


def test_old_position_ids_are_ignored_and_other_keys_are_named(random_params: Draw) -> None:
    state = to_hugging_face(to_open_clip(random_params(TINY), TINY), TINY)
    state["text_model.embeddings.position_ids"] = np.arange(32)[None]
    assert from_hugging_face(state, TINY).keys() == {entry.open_clip for entry in hugging_face_table(TINY)}
    state["text_projection.bias"] = state.pop("text_projection.weight")
    with pytest.raises(ValueError, match=r"missing text_projection\.weight; unexpected text_projection\.bias$"):
        from_hugging_face(state, TINY)


def test_thirds_that_do_not_fit_together_are_refused(random_params: Draw) -> None:
    state = to_hugging_face(to_open_clip(random_params(TINY), TINY), TINY)
    name = "vision_model.encoder.layers.0.self_attn.{}_proj.bias".format
    # Together as many numbers as three thirds of 64.
    for query, key in ((np.zeros(32), np.zeros(96)), (np.zeros(()), np.zeros(128))):
        with pytest.raises(
            ValueError, match=r"the thirds of visual\..*\.0\.attn\.in_proj_bias have shapes \(.*must be equal"
        ):
            from_hugging_face(state | {name("q"): query, name("k"): key}, TINY)


@pytest.mark.parametrize(
    ("tower", "option", "value"),
    [
        ("vision", "image_size", (32, 64)),
        ("vision", "pool_type", "avg"),
        ("vision", "no_ln_pre", True),
        ("vision", "ls_init_value", 0.1),
        ("text", "pool_type", "last"),
        ("text", "no_causal_mask", True),
        ("text", "ls_init_value", 0.1),
    ],
)
def test_a_model_that_clip_model_cannot_be_is_refused_by_its_option(tower: str, option: str, value: Any) -> None:
    changed = dataclasses.replace(getattr(TINY, tower), **{option: value})
    config = dataclasses.replace(TINY, **{tower: changed})
    for function in (hugging_face_config, hugging_face_table):
        with pytest.raises(ValueError, match=rf"^{tower}_cfg\.{option} is .*: transformers' CLIPModel can only have"):
            function(config)
