from __future__ import annotations

import copy
import pathlib
from typing import Any

import numpy as np
import pytest

from tclip_jax.artifacts import ArtifactError, verify_artifact
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.ternary import Quantizer

Tree = dict[str, Any]


def test_latent_and_packed_parameters_verify(
    written: pathlib.Path, latent: Tree, packed: Tree, rules: TernaryRules
) -> None:
    verify_artifact(written, latent, rules)
    verify_artifact(written, packed, ())


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_rest_that_differs_after_the_cast_is_named(
    written: pathlib.Path, packed: Tree, rules: TernaryRules, name: str
) -> None:
    params = copy.deepcopy(packed)
    weight = params["text"]["ln_final"][name]
    weight[3] = weight[3].astype(np.float16)
    verify_artifact(written, params, rules)
    weight[3] = np.nextafter(weight[3].astype(np.float16), np.float16(9))
    with pytest.raises(ArtifactError, match=f"text/ln_final/{name} is not what the given parameters pack to"):
        verify_artifact(written, params, rules)


@pytest.mark.parametrize("part", ["trits", "scale"])
def test_ternary_weights_that_differ_anywhere_are_named(
    written: pathlib.Path, packed: Tree, rules: TernaryRules, part: str
) -> None:
    params = copy.deepcopy(packed)
    values = getattr(params["image"]["blocks"]["mlp"]["fc2"]["kernel"], part)
    values.setflags(write=True)
    values[1, 2, 3] = 1 - values[1, 2, 3] if part == "trits" else np.nextafter(values[1, 2, 3], np.float32(9))
    with pytest.raises(ArtifactError, match="image/blocks/mlp/fc2/kernel is not what"):
        verify_artifact(written, params, rules)


def test_other_rules_are_noticed(written: pathlib.Path, latent: Tree) -> None:
    with pytest.raises(ArtifactError, match="is not what the given parameters pack to"):
        verify_artifact(written, latent, ())
    with pytest.raises(ArtifactError, match="is not what the given parameters pack to"):
        verify_artifact(written, latent, ((".*", Quantizer(factor=1.0, group="channel")),))
