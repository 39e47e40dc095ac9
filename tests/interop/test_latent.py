from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts.pack import flatten
from tclip_jax.interop.latent import latent_from_ternary, latent_params
from tclip_jax.ternary import Quantizer, TernaryTensor, quantize, ternarize

_ternarize = jax.jit(ternarize, static_argnums=(1, 2))


def assert_gives_back(w: Any, t: TernaryTensor, quantizer: Quantizer) -> None:
    assert w.dtype == np.float32 and w.shape == t.shape
    again = jax.device_get(_ternarize(w, quantizer, t.axis))
    np.testing.assert_array_equal(again.trits, t.trits)
    assert again.scale.tobytes() == np.asarray(t.scale).tobytes()


@pytest.mark.parametrize(
    ("factor", "group", "bits", "axis"),
    [
        (1.0, 64, 8, -2),
        (1.0, "channel", 24, -1),
        (1.0, "tensor", 24, -2),
        (1.5, 256, 11, -1),
        (2.0, 256, 8, -2),
        (2.0, 256, 24, -2),
        (2.0, "channel", 11, -2),
        (2.0, "tensor", 8, -1),
    ],
)
def test_what_weights_ternarize_to_is_reached_again(factor: float, group: Any, bits: Any, axis: int) -> None:
    w = np.random.default_rng(0).normal(0, 0.02, (2, 300, 70)).astype(np.float32)
    quantizer = Quantizer(factor, group, bits)
    t = jax.device_get(_ternarize(w, quantizer, axis))
    latent = latent_from_ternary(t, quantizer)
    assert_gives_back(latent, t, quantizer)
    # The weights suit training: none is far out, and zeros of both signs cancel.
    assert np.abs(latent).max() <= 2 * t.scale.max()
    assert abs(latent[t.trits == 0].mean()) < 0.01 * t.scale.max()


def test_integers_are_left_to_their_quantizer_and_trits_are_not_made_integers() -> None:
    path, uniform = "text/token_embedding/embedding", Quantizer(group=8, kind="uniform", bits=4)
    w = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, (30, 16)).astype(np.float32))
    tree = {"text": {"token_embedding": {"embedding": quantize(w, uniform, -1)}}}
    kept = flatten(latent_params(tree, ((path, uniform),)))[path]
    again = quantize(kept.dequantize(), uniform, -1)
    np.testing.assert_array_equal(again.integers, kept.integers)
    np.testing.assert_array_equal(again.scale, kept.scale)
    tree["text"]["token_embedding"]["embedding"] = quantize(w, Quantizer(group=8), -1)
    with pytest.raises(ValueError, match=f"^{path}: latent weights exist only for quantizers of kind factor, not"):
        latent_params(tree, ((path, uniform),))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_that_the_quantizer_would_change_are_refused(bits: Any) -> None:
    path, uniform = "image/projection/kernel", Quantizer(group=16, kind="uniform", bits=bits)
    w = jnp.asarray(np.random.default_rng(0).normal(0, 0.02, (64, 30)).astype(np.float32))
    tree = {"image": {"projection": {"kernel": quantize(w, uniform)}}}
    other: Any = {4: 8, 8: 4}[bits]
    changes = r"with scale_bits=8 changes [\d,]+ of its 1,920 integers, and the scale of [\d,]+$"
    for quantizer, message in (
        (dataclasses.replace(uniform, bits=other), rf"uniform bits={other} group=16 gives no integers of {bits} bits$"),
        (Quantizer(group=16), rf"k=2 group=16 gives no integers of {bits} bits$"),
        (dataclasses.replace(uniform, group=32), f"uniform bits={bits} group=32 {changes}"),
    ):
        with pytest.raises(ValueError, match=f"^{path}: the quantizer {message}"):
            latent_params(tree, ((path, quantizer),))
    with pytest.raises(ValueError, match=f"^{path} has integers of {bits} bits, but no rule of the run matches it$"):
        latent_params(tree, ())
    of_64 = ((path, dataclasses.replace(uniform, group=64)),)  # the groups are those of "channel"
    tree["image"]["projection"]["kernel"] = quantize(w, dataclasses.replace(uniform, group="channel"))
    assert flatten(latent_params(tree, of_64)).keys() == {path}
    exact = dataclasses.replace(uniform, scale_bits=24)
    tree["image"]["projection"]["kernel"] = quantize(w, exact)
    with pytest.raises(ValueError, match=r"scale_bits=24 changes 0 of its 1,920 integers, and the scale of \d+$"):
        latent_params(tree, ((path, exact),))


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 11, 24]), st.floats(0.02, 0.98), st.integers(-9, 2))
@settings(max_examples=60, deadline=None)
def test_any_trits_and_scales_of_factor_2_with_a_zero_in_each_group(
    seed: int, bits: Any, density: float, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    trits = (rng.choice([-1, 1], (512, 3)) * (rng.random((512, 3)) < density)).astype(np.int8)
    trits[::256], trits[1::256] = 0, 1
    scale = rng.integers(2 ** (bits - 1), 2**bits, (2, 3)) * 2.0 ** (exponent - bits)
    t = TernaryTensor(trits, scale.astype(np.float32), 256)  # type: ignore[arg-type]
    quantizer = Quantizer(2.0, 256, bits)
    assert_gives_back(latent_from_ternary(t, quantizer), t, quantizer)


def test_groups_of_zeros_with_and_without_a_scale() -> None:
    t = TernaryTensor(np.zeros((512, 1), np.int8), np.float32([[0], [0.5]]), 256)  # type: ignore[arg-type]
    latent = latent_from_ternary(t, Quantizer())
    assert not latent[:256].any()
    np.testing.assert_array_equal(np.abs(latent[256:]), 0.25)


@pytest.mark.parametrize(
    ("changed", "quantizer", "message"),
    [
        (
            {"scale": np.float32([[1, 1], [1, 2]]), "group": 128, "trits": np.ones((256, 2), np.int8)},
            Quantizer(),
            "128 weights have another scale than the rest of their group",
        ),
        ({"scale": np.float32([[0.1, 1]])}, Quantizer(), "its scales have 24 significant bits: the quantizer keeps 8"),
        (
            {"trits": np.ones((256, 2), np.int8)},
            Quantizer(),
            "no weights give 0 of its 2 scales and 512 of its 512 trits",
        ),
        ({"scale": np.float32([[1, 2.0**-20]])}, Quantizer(), "no weights give 1 of its 2 scales"),
    ],
)
def test_what_a_quantizer_cannot_give_is_refused(changed: dict[str, Any], quantizer: Quantizer, message: str) -> None:
    fields = {"trits": np.eye(256, 2, dtype=np.int8), "scale": np.ones((1, 2), np.float32), "group": 256} | changed
    with pytest.raises(ValueError, match=message):
        latent_from_ternary(TernaryTensor(**fields), quantizer)


def test_a_tree_keeps_its_floats_and_names_what_has_no_rule() -> None:
    path = "text/blocks/mlp/fc1/kernel"
    quantizer = Quantizer(group="channel")
    t = ternarize(jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4)), jnp.float32), quantizer)
    params = {"text": {"blocks": {"mlp": {"fc1": {"kernel": t, "bias": np.ones(4)}}}}}
    latent = latent_params(params, ((path, quantizer),))["text"]["blocks"]["mlp"]["fc1"]
    assert latent["bias"] is params["text"]["blocks"]["mlp"]["fc1"]["bias"]  # type: ignore[comparison-overlap]
    assert_gives_back(latent["kernel"], jax.device_get(t), quantizer)
    with pytest.raises(ValueError, match=rf"^{path} is ternary, but no rule"):
        latent_params(params, ())
    with pytest.raises(ValueError, match=rf"^{path}: \d+ weights have another scale"):
        latent_params(params, ((path, Quantizer(group="tensor")),))


@pytest.mark.parametrize("group", [64, 96, 256, "channel", "tensor"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_other_groups_of_the_same_scales(group: Any, axis: int) -> None:
    """The groups may differ from the quantizer's: GGUF has groups of 256, recovery finds the largest."""
    trits: Any = np.random.default_rng(0).integers(-1, 2, (2, 512, 512), np.int8)
    trits[:, :256] = 0
    coarse: Any = np.full((2, 1, 1), 0.75, np.float32)
    shape = (2, 512, 2) if axis == -1 else (2, 2, 512)
    for t in (
        TernaryTensor(trits, coarse, 512, axis),
        TernaryTensor(trits, np.full(shape, 0.75, np.float32), 256, axis),  # type: ignore[arg-type]
    ):
        again = jax.device_get(_ternarize(latent_from_ternary(t, Quantizer(group=group)), Quantizer(group=group), axis))
        np.testing.assert_array_equal(again.trits, trits)
        assert {*np.unique(again.scale)} == {0.75}
