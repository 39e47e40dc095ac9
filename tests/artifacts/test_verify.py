from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.artifacts import ArtifactError, verify_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.ternary import Quantizer, TernaryTensor

Tree = dict[str, Any]

FC2 = "image/blocks/mlp/fc2/kernel"


def test_latent_and_packed_parameters_verify(
    written: pathlib.Path, latent: Tree, packed: Tree, rules: TernaryRules, config: CLIPConfig, preprocess: Preprocess
) -> None:
    leaves = flatten(packed).values()
    ternary = [leaf for leaf in leaves if isinstance(leaf, TernaryTensor)]
    outcome = verify_artifact(written, latent, rules, config=config, preprocess=preprocess)
    assert outcome == verify_artifact(written, packed)
    assert outcome.differences == ()
    assert outcome.trits == sum(leaf.trits.size for leaf in ternary)
    assert outcome.scales == sum(leaf.scale.size for leaf in ternary)
    assert outcome.floats == sum(leaf.size for leaf in leaves if not isinstance(leaf, TernaryTensor))


def test_dequantised_weights_of_another_library_verify(written: pathlib.Path, packed: Tree) -> None:
    def dequantize(leaf: Any) -> Any:
        if not isinstance(leaf, TernaryTensor):
            return leaf
        weights = np.asarray(leaf.dequantize())
        return np.where(weights == 0, np.float32(-0.0), weights)

    floats = jax.tree.map(dequantize, packed, is_leaf=lambda leaf: isinstance(leaf, TernaryTensor))
    assert verify_artifact(written, floats).differences == ()
    floats["text"]["token_embedding"]["embedding"] *= np.float32(1 + 2**-20)
    (difference,) = verify_artifact(written, floats).differences
    assert difference.startswith("text/token_embedding/embedding: ") and "of 800 weights differ" in difference


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_rest_that_differs_after_the_cast_is_named(written: pathlib.Path, packed: Tree, name: str) -> None:
    params = copy.deepcopy(packed)
    weight = params["text"]["ln_final"][name]
    weight[3] = weight[3].astype(np.float16)
    assert verify_artifact(written, params).differences == ()
    weight[3] = np.nextafter(weight[3].astype(np.float16), np.float16(9))
    expected = f"text/ln_final/{name}: 1 of 16 values as float16 differ, the first at (3,)"
    assert verify_artifact(written, params).differences == (expected,)


@pytest.mark.parametrize(("part", "size"), [("trits", 2 * 96 * 24), ("scale", 2 * 5 * 24)])
def test_ternary_weights_that_differ_anywhere_are_named(
    written: pathlib.Path, packed: Tree, part: str, size: int
) -> None:
    params = copy.deepcopy(packed)
    values = getattr(params["image"]["blocks"]["mlp"]["fc2"]["kernel"], part)
    values.setflags(write=True)
    values[1, 2, 3] = 1 - values[1, 2, 3] if part == "trits" else np.nextafter(values[1, 2, 3], np.float32(9))
    name = part.removesuffix("s") + "s"
    expected = f"{FC2}: 1 of {size:,} {name} differ, the first at (1, 2, 3)"
    assert verify_artifact(written, params).differences == (expected,)


def test_every_difference_is_listed(written: pathlib.Path, latent: Tree, packed: Tree) -> None:
    params = copy.deepcopy(packed)
    params["image"]["blocks"]["mlp"]["fc2"]["kernel"] = dataclasses.replace(
        packed["image"]["blocks"]["mlp"]["fc2"]["kernel"], scale=np.ones((2, 4, 24), np.float32), group=24
    )
    params["logit_scale"] = np.float32(1)
    params["image"]["ln_pre"]["bias"] = np.ones(25, np.float32)
    assert verify_artifact(written, params).differences == (
        f"{FC2}: groups of 20, scales (2, 5, 24), expected groups of 24, scales (2, 4, 24)",
        "image/ln_pre/bias: shape (24,), expected (25,)",
        "logit_scale: 1 of 1 values as float32 differ, the first at (0,)",
    )
    assert len(verify_artifact(written, latent).differences) == 9  # without rules the ternary weights are latent
    everything: TernaryRules = ((".*", Quantizer(group="channel")),)
    differences = verify_artifact(written, latent, everything).differences
    assert "image/projection/kernel: float, expected trits" in differences


def test_another_model_is_noticed(
    written: pathlib.Path, packed: Tree, config: CLIPConfig, preprocess: Preprocess
) -> None:
    other = dataclasses.replace(config, quick_gelu=True)
    (difference,) = verify_artifact(written, packed, config=other, preprocess=preprocess).differences
    assert difference == "model: quick_gelu: False, not True"
    (difference,) = verify_artifact(written, packed, preprocess=Preprocess(16, resize_mode="squash")).differences
    assert difference == "preprocessing: resize_mode: 'shortest', not 'squash'"
    wider = dataclasses.replace(config, embed_dim=config.embed_dim + 1)
    params = copy.deepcopy(packed)
    kernel = np.asarray(packed["image"]["projection"]["kernel"])
    params["image"]["projection"]["kernel"] = np.pad(kernel, ((0, 0), (0, 1)))
    differences = verify_artifact(written, params, config=wider).differences
    assert differences == (f"model: embed_dim: {config.embed_dim}, not {wider.embed_dim}",)
    with pytest.raises(ArtifactError, match="tensors does not fit the model: unexpected logit_scale"):
        verify_artifact(written, {name: leaf for name, leaf in packed.items() if name != "logit_scale"})
