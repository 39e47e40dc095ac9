"""Initialisation from a wider and deeper model: the selected weights, and the cases that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts import pack_params
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.inherit import chosen_layers, inherit_params
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer

WIDE = CLIPConfig(12, VisionConfig((16, 16), 8, 32, 5, 8), TextConfig(6, 40, 24, 3, 3))
SMALL = CLIPConfig(8, VisionConfig((16, 16), 8, 16, 3, 8), TextConfig(5, 40, 16, 2, 2))


def draw(config: CLIPConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), param_shapes(config))


def test_layers_are_chosen_evenly() -> None:
    assert chosen_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert chosen_layers(5, 3) == [0, 2, 4] and chosen_layers(3, 3) == [0, 1, 2] and chosen_layers(4, 1) == [0]


def test_leading_channels_and_heads_of_the_chosen_layers() -> None:
    wide = flatten_dict(draw(WIDE), sep="/")
    inherited = flatten_dict(inherit_params(draw(WIDE), WIDE, SMALL), sep="/")
    assert {p: x.shape for p, x in inherited.items()} == {
        p: x.shape for p, x in flatten_dict(param_shapes(SMALL), sep="/").items()
    }
    layer = {0: 0, 1: 2, 2: 4}
    for i, j in layer.items():
        qkv, whole = inherited["image/blocks/attention/qkv/kernel"][i], wide["image/blocks/attention/qkv/kernel"][j]
        for part in range(3):  # two of four heads of width eight
            np.testing.assert_array_equal(qkv[:, 16 * part : 16 * (part + 1)], whole[:16, 32 * part : 32 * part + 16])
        out = inherited["image/blocks/attention/out/kernel"][i]
        np.testing.assert_array_equal(out, wide["image/blocks/attention/out/kernel"][j][:16, :16])
        np.testing.assert_array_equal(
            inherited["image/blocks/mlp/fc1/kernel"][i], wide["image/blocks/mlp/fc1/kernel"][j][:16, :64]
        )
        np.testing.assert_array_equal(inherited["image/blocks/ln_1/scale"][i], wide["image/blocks/ln_1/scale"][j][:16])
    np.testing.assert_array_equal(
        inherited["image/patch_embedding/kernel"], wide["image/patch_embedding/kernel"][..., :16]
    )
    np.testing.assert_array_equal(inherited["text/position_embedding"], wide["text/position_embedding"][:5, :16])
    np.testing.assert_array_equal(inherited["text/projection/kernel"], wide["text/projection/kernel"][:16, :8])


@pytest.mark.slow
def test_the_same_shape_inherits_everything_also_from_ternary_weights() -> None:
    params = draw(WIDE)
    jax.tree.map(np.testing.assert_array_equal, inherit_params(params, WIDE, WIDE), params)
    rules = ternary_rules([(".*", Quantizer(group=16))], Quantizer())
    packed = pack_params(params, rules)
    images, tokens = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 6), np.int32)
    apply = jax.jit(CLIP(WIDE).apply)
    expected, inherited = (
        apply({"params": each}, images, tokens)[0] for each in (packed, inherit_params(packed, WIDE, WIDE))
    )
    np.testing.assert_allclose(inherited, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (dataclasses.replace(SMALL, embed_dim=16), r"projection/kernel: the student's \(.*, 16\) is not within"),
        (dataclasses.replace(SMALL, text=TextConfig(6, 40, 16, 2, 4)), "4 layers of 2 heads, the other model 3 of 3"),
        (dataclasses.replace(SMALL, text=TextConfig(6, 41, 16, 2, 2)), "vocabulary is 41: .* must be .* 40"),
        (dataclasses.replace(SMALL, vision=VisionConfig((16, 16), 4, 16, 3, 8)), "patch size is 4"),
        (dataclasses.replace(SMALL, vision=VisionConfig((24, 24), 8, 16, 3, 8)), r"grid of patches is \(3, 3\)"),
        (
            dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, ls_init_value=0.1)),
            "has image/blocks/ls_1, which the other model lacks",
        ),
    ],
)
def test_what_cannot_be_inherited_is_named(student: CLIPConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inherit_params(draw(WIDE), WIDE, student)
