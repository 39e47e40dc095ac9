from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.interop.open_clip import from_open_clip, open_clip_table, to_open_clip
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tclip_jax.ternary import TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

SMALL = CLIPConfig.from_open_clip(
    {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    }
)
LAYER_SCALE = dataclasses.replace(
    SMALL,
    vision=dataclasses.replace(SMALL.vision, ls_init_value=0.1, no_ln_pre=True),
    text=dataclasses.replace(SMALL.text, ls_init_value=0.1, mlp_ratio=2.0),
)


def assert_same_trees(left: Params, right: Params) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("config", [SMALL, LAYER_SCALE], ids=["plain", "layer scale, no ln_pre"])
def test_import_is_the_inverse_of_export(config: CLIPConfig, random_params: Draw) -> None:
    params = random_params(config)
    assert_same_trees(from_open_clip(to_open_clip(params, config), config), params)


@pytest.mark.torch
@pytest.mark.parametrize("config", [SMALL, LAYER_SCALE], ids=["plain", "layer scale, no ln_pre"])
def test_open_clip_has_the_same_keys_and_shapes(config: CLIPConfig, random_params: Draw) -> None:
    import open_clip

    theirs = open_clip.CLIP(**config.to_open_clip()).state_dict()
    ours = to_open_clip(random_params(config), config)
    assert {key: value.shape for key, value in ours.items()} == {
        key: tuple(value.shape) for key, value in theirs.items()
    }
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in ours.values())


@pytest.mark.parametrize(("preset", "keys"), [("ViT-B-32", 302), ("ViT-B-16", 302), ("ViT-L-14", 446)])
def test_presets_have_as_many_tensors_as_open_clip(preset: str, keys: int) -> None:
    entries = open_clip_table(CLIPConfig.from_open_clip(PRESETS[preset]))
    assert len(entries) == len({entry.key for entry in entries}) == keys


@pytest.mark.parametrize(
    ("path", "key", "axis", "group", "scale_shape"),
    [
        ("image/blocks/mlp/fc1/kernel", "visual.transformer.resblocks.{}.mlp.c_fc.weight", -2, 12, (3, 3, 128)),
        (
            "image/blocks/attention/qkv/kernel",
            "visual.transformer.resblocks.{}.attn.in_proj_weight",
            -2,
            32,
            (3, 1, 96),
        ),
        ("text/blocks/mlp/fc2/kernel", "transformer.resblocks.{}.mlp.c_proj.weight", -2, 64, (2, 1, 1)),
        ("text/token_embedding/embedding", "token_embedding.weight", -1, 8, (50, 2)),
    ],
    ids=["group", "channel", "tensor", "embedding"],
)
def test_ternary_weights_are_the_product_of_what_is_stored(
    path: str, key: str, axis: int, group: int, scale_shape: tuple[int, ...], random_params: Draw
) -> None:
    rng = np.random.default_rng(1)
    leaves = flatten_dict(random_params(SMALL), sep="/")
    shape = leaves[path].shape
    trits, scale = rng.integers(-1, 2, shape, np.int8), rng.random(scale_shape, np.float32)
    leaves[path] = TernaryTensor(jnp.asarray(trits), jnp.asarray(scale), group, axis)
    state = to_open_clip(unflatten_dict(leaves, sep="/"), SMALL)
    expected = trits * np.repeat(scale, group, axis).take(range(shape[axis]), axis)
    if axis == -1:
        np.testing.assert_array_equal(state[key], expected)
    else:
        for i, layer in enumerate(expected):
            np.testing.assert_array_equal(state[key.format(i)], layer.T)


def test_keys_and_dtypes_of_other_writers_are_accepted(random_params: Draw) -> None:
    params = random_params(SMALL)
    state = to_open_clip(params, SMALL)
    state["logit_scale"] = state["logit_scale"].reshape(1)
    assert_same_trees(from_open_clip({f"module.{key}": value for key, value in state.items()}, SMALL), params)
    text = {key if key.startswith(("visual.", "logit")) else f"text.{key}": value for key, value in state.items()}
    assert_same_trees(from_open_clip(text, SMALL), params)
    openai = {key: value.astype(np.float16) for key, value in state.items()}
    openai |= {"input_resolution": np.array(16), "context_length": np.array(8), "vocab_size": np.array(50)}
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), params)
    assert_same_trees(from_open_clip(openai, SMALL), half)


def test_missing_and_unexpected_keys_are_named(random_params: Draw) -> None:
    state = to_open_clip(random_params(SMALL), SMALL)
    state["logit_bias"] = state.pop("visual.proj")
    with pytest.raises(ValueError, match=r"^the state dict .*: missing visual\.proj; unexpected logit_bias$"):
        from_open_clip(state, SMALL)
    deeper = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, layers=4))
    with pytest.raises(ValueError, match=r"resblocks\.3\.attn\.in_proj_bias, .* and 8 more; unexpected logit_bias$"):
        from_open_clip(state, deeper)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(random_params: Draw) -> None:
    params = random_params(SMALL)
    finer = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, image_size=(32, 32)))
    message = r"^visual\.positional_embedding has shape \(5, 32\): the model's is \(17, 32\)$"
    with pytest.raises(ValueError, match=message):
        from_open_clip(to_open_clip(params, SMALL), finer)
    with pytest.raises(ValueError, match=message):
        to_open_clip(params, finer)


def test_a_parameter_tree_of_another_model_is_refused(random_params: Draw) -> None:
    with pytest.raises(
        ValueError, match=r"^the parameter tree .*: missing image/blocks/ls_1, .*; unexpected image/ln_pre"
    ):
        to_open_clip(random_params(SMALL), dataclasses.replace(LAYER_SCALE, text=SMALL.text))
