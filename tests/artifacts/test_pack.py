from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules
from tclip_jax.ternary import Quantizer, TernaryTensor

Tree = dict[str, Any]


def test_trits_and_scales_equal_those_of_a_float64_reference(latent: Tree, packed: Tree) -> None:
    path = "image/blocks/mlp/fc2/kernel"
    w, found = flatten(latent)[path].astype(np.float64), flatten(packed)[path]
    for start in range(0, w.shape[1], 20):
        part = slice(start, start + 20)
        mean = 2 * np.abs(w[:, part]).mean(1)
        scale = found.scale[:, start // 20]
        np.testing.assert_allclose(scale, mean, rtol=2**-8)  # eight significant bits
        np.testing.assert_array_equal(
            found.trits[:, part], np.sign(w[:, part]) * (np.abs(w[:, part]) > scale[:, None] / 2)
        )


def test_rules_decide_which_leaves_are_ternary(latent: Tree, packed: Tree) -> None:
    before, after = flatten(latent), flatten(packed)
    ternary = {path for path, leaf in after.items() if isinstance(leaf, TernaryTensor)}
    blocks = {f"{tower}/blocks/{name}/kernel" for tower in ("image", "text") for name in ("mlp/fc1", "mlp/fc2")}
    blocks |= {f"{tower}/blocks/attention/{name}/kernel" for tower in ("image", "text") for name in ("qkv", "out")}
    assert ternary == blocks | {"text/token_embedding/embedding"}
    assert {path: after[path].axis for path in ternary if after[path].axis == -1} == {
        "text/token_embedding/embedding": -1
    }
    for path in before.keys() - ternary:
        np.testing.assert_array_equal(after[path], before[path])


def test_leaves_are_numpy_and_packing_again_changes_nothing(packed: Tree, rules: TernaryRules) -> None:
    again = pack_params(packed, rules)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    for leaf, expected in zip(jax.tree.leaves(again), jax.tree.leaves(packed), strict=True):
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected)


def test_a_rule_for_everything_packs_only_what_the_model_can_use(latent: Tree, config: CLIPConfig) -> None:
    packed = flatten(pack_params(latent, ((".*", Quantizer(group="channel")),)))
    possible = {path for path in TERNARIZABLE if "/pool/" not in path}  # which only a SigLIP has
    assert {path for path, leaf in packed.items() if isinstance(leaf, TernaryTensor)} == possible
    assert packed["image/patch_embedding/kernel"].shape == (192, 24)  # rows, columns and channels are its inputs
    assert possible <= flatten(param_shapes(config)).keys()
