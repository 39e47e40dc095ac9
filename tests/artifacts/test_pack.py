from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, ternary_rules
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


def test_the_bias_of_dead_zone_weights_folds_into_that_of_their_layer_and_outputs_keep(
    latent: Tree, config: CLIPConfig
) -> None:
    """Those of the model that is trained and of the packed one, and with other layers of the artifact untouched."""
    rules = ternary_rules("Q-FFN", Quantizer(group=20, dead_zone_bias=0.5))
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, *config.vision.image_size, 3)).astype(np.float32)
    tokens = rng.integers(0, config.text.vocab_size, (2, config.text.context_length), np.int32)
    packed = pack_params(latent, rules)
    trained, made = (jax.jit(CLIP(config, rules).apply)({"params": tree}, pixels, tokens) for tree in (latent, packed))
    for a, b in zip(trained, made, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    before, after = flatten(latent), flatten(packed)
    changed = {path for path, leaf in before.items() if path not in TERNARIZABLE and np.any(after[path] != leaf)}
    assert changed == {f"{tower}/blocks/mlp/{name}/bias" for tower in ("image", "text") for name in ("fc1", "fc2")}
    for path in changed:
        weight = after[path.replace("bias", "kernel")]
        w = np.float64(before[path.replace("bias", "kernel")])
        added = 0.5 * np.where(weight.trits == 0, w, 0).sum(-2)
        assert (np.abs(after[path] - (before[path] + added)) <= 2.0**-15 * np.abs(added) + 1e-7).all()  # 16 bits
    again = flatten(pack_params(packed, rules))
    assert all(np.array_equal(again[path], after[path]) for path in changed)


@pytest.mark.slow
def test_a_rule_for_everything_adds_the_bias_of_the_patch_embedding_in_training_too(config: CLIPConfig) -> None:
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_bias=True))
    rules = ((".*", Quantizer(group=20, dead_zone_bias=0.5)),)
    model, rng, path = CLIP(config, rules), np.random.default_rng(0), "image/patch_embedding/bias"
    params = jax.device_get(init_params(model, jax.random.key(0)))
    packed = pack_params(params, rules)
    assert np.abs(flatten(packed)[path]).max() > 0.01 and not np.any(flatten(params)[path])
    pixels = rng.normal(size=(2, *config.vision.image_size, 3)).astype(np.float32)
    tokens = rng.integers(0, config.text.vocab_size, (2, config.text.context_length), np.int32)
    trained, made = (jax.jit(model.apply)({"params": tree}, pixels, tokens) for tree in (params, packed))
    for a, b in zip(trained, made, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_a_rule_for_everything_packs_only_what_the_model_can_use(latent: Tree, config: CLIPConfig) -> None:
    packed = flatten(pack_params(latent, ((".*", Quantizer(group="channel")),)))
    possible = {path for path in TERNARIZABLE if "/pool/" not in path}  # which only a SigLIP has
    assert {path for path, leaf in packed.items() if isinstance(leaf, TernaryTensor)} == possible
    assert packed["image/patch_embedding/kernel"].shape == (192, 24)  # rows, columns and channels are its inputs
    assert possible <= flatten(param_shapes(config)).keys()
