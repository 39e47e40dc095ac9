from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts.pack import pack_params
from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, ternary_rules
from tclip_jax.numerics.weights import compare_weights, weights_report
from tclip_jax.ternary import Quantizer, TernaryTensor

FC1 = "text/blocks/mlp/fc1/kernel"


def edited(params: Any, path: str, edit: Any) -> dict[str, Any]:
    leaves = flatten_dict(jax.device_get(params), sep="/")
    return unflatten_dict(leaves | {path: edit(leaves[path])}, sep="/")


@pytest.fixture(scope="module")
def packed(model: Model) -> dict[str, Any]:
    return pack_params(model.params, ternary_rules("Q-ALL", Quantizer(group=8)))


def test_identical_weights_pass(model: Model) -> None:
    report = weights_report("title", model, model)
    assert report.passed and len(report.tables["weights"]) == 14 + 12 * (3 + 2)
    assert {row.max_abs for row in report.tables["weights"]} == {0}


def test_one_scaled_layer_is_named(model: Model) -> None:
    layer = np.array([1.0, 1.01], np.float32)[:, None, None]
    changed = dataclasses.replace(model, params=edited(model.params, FC1, lambda kernel: kernel * layer))
    report = weights_report("title", changed, model)
    (over,) = [row for row in report.tables["weights"] if row.over(0)]
    assert over.name == "text/blocks/1/mlp/fc1/kernel" and not report.passed
    assert 0.005 < over.relative < 0.01 and over.trit_flips is None and over.scale_error is None
    assert report.verdict[-1] == f"farthest apart: {over.name}"
    assert weights_report("title", changed, model, budget=0.01).passed


def test_latent_weights_are_compared_as_their_rules_make_them(model: Model, packed: dict[str, Any]) -> None:
    latent = dataclasses.replace(model, rules=ternary_rules("Q-ALL", Quantizer(group=8)))
    assert weights_report("title", latent, dataclasses.replace(model, params=packed)).passed
    assert not weights_report("title", latent, model).passed


def test_trit_flips_and_scale_error(packed: dict[str, Any]) -> None:
    def change(leaf: TernaryTensor) -> TernaryTensor:
        trits, scale = np.array(leaf.trits), np.array(leaf.scale)
        trits[1, :3, 5] = (trits[1, :3, 5] + 2) % 3 - 1
        scale[0] *= 1.25
        return TernaryTensor(trits, scale, leaf.group, leaf.axis)

    rows = {row.name: row for row in compare_weights(edited(packed, FC1, change), packed).differences}
    first, second = (rows[f"text/blocks/{i}/mlp/fc1/kernel"] for i in range(2))
    assert (first.trit_flips, second.trit_flips) == (0, 3)
    np.testing.assert_allclose((first.scale_error, second.scale_error), (0.25, 0), rtol=1e-6)


def test_a_dequantised_copy_has_no_flips_and_one_sign_is_one(packed: dict[str, Any]) -> None:
    floats = edited(packed, FC1, lambda leaf: np.array(leaf.dequantize()))
    rows = [row for row in compare_weights(floats, packed).differences if "text/blocks/0/mlp/fc1/kernel" in row.name]
    assert [(row.trit_flips, row.scale_error, row.max_abs) for row in rows] == [(0, None, 0)]
    index = tuple(np.argwhere(floats["text"]["blocks"]["mlp"]["fc1"]["kernel"][0])[0])
    floats["text"]["blocks"]["mlp"]["fc1"]["kernel"][0][index] *= -1
    assert sum(row.trit_flips or 0 for row in compare_weights(floats, packed).differences) == 1


def test_a_ternary_patch_embedding_is_compared_with_a_float_one(model: Model) -> None:
    packed = pack_params(model.params, ternary_rules([(PATCH_EMBEDDING, Quantizer())], Quantizer()))
    shape = model.params["image"]["patch_embedding"]["kernel"].shape
    floats = edited(packed, PATCH_EMBEDDING, lambda leaf: np.reshape(leaf.dequantize(), shape))
    for pair in ((packed, floats), (floats, packed)):
        rows = {row.name: row for row in compare_weights(*pair).differences}
        assert (rows[PATCH_EMBEDDING].trit_flips, rows[PATCH_EMBEDDING].max_abs) == (0, 0)


def test_missing_and_unexpected_are_named(model: Model) -> None:
    leaves = flatten_dict(model.params, sep="/")
    less = unflatten_dict({path: leaf for path, leaf in leaves.items() if path != "image/ln_pre/bias"}, sep="/")
    for ours, theirs, names in ((less, model.params, ("image/ln_pre/bias",)), (model.params, less, ())):
        comparison = compare_weights(ours, theirs)
        assert comparison.missing == names and comparison.missing + comparison.unexpected == ("image/ln_pre/bias",)
    report = weights_report("title", dataclasses.replace(model, params=less), model)
    assert not report.passed and "missing: image/ln_pre/bias" in report.verdict


def test_models_of_other_shapes_are_not_compared(model: Model) -> None:
    text = dataclasses.replace(model.config.text, context_length=8)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, text=text))
    report = weights_report("title", model, other)
    assert not report.passed and not report.tables and report.configurations == {"text.context_length": (12, 8)}
    assert report.verdict == ("the models have different shapes, so no weight can be compared",)


def test_options_that_differ_are_shown_beside_equal_weights(model: Model) -> None:
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, quick_gelu=True))
    report = weights_report("title", model, other)
    assert report.passed and report.configurations == {"quick_gelu": (False, True)}
