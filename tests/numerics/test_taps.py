from __future__ import annotations

import jax
import numpy as np
import pytest

from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP
from tclip_jax.numerics.taps import Taps, collect_taps, tap_names

Batch = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def taps(model: Model, batch: Batch) -> Taps:
    return collect_taps(model, *batch)


def test_names_are_in_the_order_of_the_computation(model: Model, taps: Taps) -> None:
    assert tuple(taps) == tap_names(model.config) and len(taps) == (5 + 3 * 3) + (5 + 3 * 2)
    assert list(taps)[14:20] == [
        "text/token_embedding",
        "text/embedded",
        "text/blocks/0/attention",
        "text/blocks/0/mlp",
        "text/blocks/0",
        "text/blocks/1/attention",
    ]


def test_taps_are_what_the_model_computes(model: Model, batch: Batch, taps: Taps) -> None:
    np.testing.assert_allclose(taps["image/embedding"], model.encode_image(batch[0]), atol=1e-6)
    np.testing.assert_allclose(taps["text/embedding"], model.encode_text(batch[1]), atol=1e-6)
    for tower, layers in (("image", 3), ("text", 2)):
        stream = np.float64(taps[f"{tower}/embedded"])
        for i in range(layers):
            stream = stream + taps[f"{tower}/blocks/{i}/attention"] + taps[f"{tower}/blocks/{i}/mlp"]
            np.testing.assert_allclose(taps[f"{tower}/blocks/{i}"], stream, atol=1e-5)
    assert taps["image/patch_embedding"].shape == (4, 4, 32) and taps["image/ln_post"].shape == (4, 32)


@pytest.mark.parametrize(
    ("changed", "readers"),
    [
        ("image/patch_embedding", {"image/embedded"}),
        ("image/embedded", {"image/blocks/0/attention", "image/blocks/0/mlp", "image/blocks/0"}),
        ("image/blocks/1/attention", {"image/blocks/1/mlp", "image/blocks/1"}),
        ("image/blocks/1/mlp", {"image/blocks/1"}),
        ("image/blocks/1", {"image/blocks/2/attention", "image/blocks/2/mlp", "image/blocks/2"}),
        ("image/blocks/2", {"image/ln_post"}),
        ("text/ln_final", {"text/projection"}),
        ("text/projection", {"text/embedding"}),
        ("text/embedding", set()),
    ],
)
def test_a_tap_of_the_reference_reaches_its_readers_and_no_further(
    model: Model, batch: Batch, taps: Taps, changed: str, readers: set[str]
) -> None:
    # New noise, because LayerNorm cancels a factor or an offset.
    noise = np.random.default_rng(0).standard_normal(taps[changed].shape, np.float32)
    isolated = collect_taps(model, *batch, taps | {changed: taps[changed] + noise})
    assert {name for name in taps if not np.allclose(isolated[name], taps[name], atol=1e-5)} == readers


def test_an_own_reference_changes_no_bit(model: Model, batch: Batch, taps: Taps) -> None:
    isolated = collect_taps(model, *batch, taps)
    assert all(np.array_equal(isolated[name], taps[name]) for name in taps)


def test_nothing_is_recorded_where_nobody_asks(model: Model, batch: Batch) -> None:
    jaxpr = jax.make_jaxpr(CLIP(model.config).apply)({"params": model.params}, *batch)
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert [len(scan.outvars) for scan in scans] == [1, 1]
