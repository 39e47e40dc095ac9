from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import find_quantizer, input_axis, ternary_rules
from tclip_jax.ternary import Quantizer, ternarize

Params = dict[str, Any]

CONFIG = CLIPConfig.from_open_clip(
    {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    }
)
RULES = ternary_rules("Q-ALL", Quantizer(group=12))
IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3), np.float32)
TOKENS = np.array([[48, 5, 9, 49, 0, 0, 0, 0], [48, 49, 0, 0, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, 6, 49]], np.int32)


@pytest.fixture(scope="module")
def params() -> Params:
    """Noise around 0, or around 1 for scales, so that no parameter has its initial value."""
    rng = np.random.default_rng(1)

    def leaf(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key in ("scale", "logit_scale") else 0.0
        return mean + 0.2 * rng.standard_normal(shape.shape, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, param_shapes(CONFIG))


def embed(model: CLIP, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    return jax.jit(model.apply)({"params": params}, IMAGES, TOKENS)


def block_shapes(tower: str, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    hidden = 4 * width
    shapes = {
        **{f"{norm}/{leaf}": (width,) for norm in ("ln_1", "ln_2") for leaf in ("scale", "bias")},
        "attention/qkv/kernel": (width, 3 * width),
        "attention/qkv/bias": (3 * width,),
        "attention/out/kernel": (width, width),
        "attention/out/bias": (width,),
        "mlp/fc1/kernel": (width, hidden),
        "mlp/fc1/bias": (hidden,),
        "mlp/fc2/kernel": (hidden, width),
        "mlp/fc2/bias": (width,),
    }
    return {f"{tower}/blocks/{path}": (layers, *shape) for path, shape in shapes.items()}


def test_parameter_tree() -> None:
    """Rules, converters, sharding and checkpoints depend on these paths."""
    expected = {
        "logit_scale": (),
        "image/patch_embedding/kernel": (8, 8, 3, 32),
        "image/class_embedding": (32,),
        "image/position_embedding": (5, 32),
        **{f"image/{norm}/{leaf}": (32,) for norm in ("ln_pre", "ln_post") for leaf in ("scale", "bias")},
        "image/projection/kernel": (32, 24),
        **block_shapes("image", 3, 32),
        "text/token_embedding/embedding": (50, 16),
        "text/position_embedding": (8, 16),
        "text/ln_final/scale": (16,),
        "text/ln_final/bias": (16,),
        "text/projection/kernel": (16, 24),
        **block_shapes("text", 2, 16),
    }
    leaves = flatten_dict(param_shapes(CONFIG), sep="/")
    assert {path: leaf.shape for path, leaf in leaves.items()} == expected
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("remat", [False, True])
def test_options_change_no_parameter(remat: bool) -> None:
    model = CLIP(CONFIG, RULES, jnp.bfloat16, remat)
    assert jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)) == param_shapes(CONFIG)


def test_initial_temperature_is_that_of_the_paper() -> None:
    initial = jax.jit(lambda key: init_params(CLIP(CONFIG), key)["logit_scale"])(jax.random.key(0))
    np.testing.assert_allclose(np.exp(np.float64(initial)), 1 / 0.07, rtol=1e-6)


@pytest.mark.slow
def test_remat_recomputes_blocks_and_changes_no_gradient(params: Params) -> None:
    def loss(params: Params, remat: bool) -> jax.Array:
        text = CLIP(CONFIG, remat=remat).apply({"params": params}, TOKENS, method="encode_text")
        return (text @ text.T)[0, 1]

    grad = jax.grad(loss)
    programs = [str(jax.make_jaxpr(grad, static_argnums=1)(params, remat)) for remat in (False, True)]
    assert ["checkpoint" in program or "remat" in program for program in programs] == [False, True]
    plain, remat = (jax.jit(grad, static_argnums=1)(params, remat)["text"] for remat in (False, True))
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=1e-6), plain, remat)
    assert min(abs(leaf).max() for leaf in jax.tree.leaves(remat)) > 0


def test_each_tower_is_one_scan_whatever_its_depth() -> None:
    def equations(layers: int) -> list[str]:
        vision = dataclasses.replace(CONFIG.vision, layers=layers)
        text = dataclasses.replace(CONFIG.text, layers=layers)
        config = dataclasses.replace(CONFIG, vision=vision, text=text)
        jaxpr = jax.make_jaxpr(CLIP(config).apply)({"params": param_shapes(config)}, IMAGES, TOKENS)
        return [str(equation.primitive) for equation in jaxpr.eqns]

    assert equations(2) == equations(9)
    assert equations(2).count("scan") == 2


def test_packed_weights_give_the_embeddings_of_training(params: Params) -> None:
    def pack(leaf_path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> Any:
        path = "/".join(key.key for key in leaf_path)
        quantizer = find_quantizer(path, RULES)
        return ternarize(leaf, quantizer, input_axis(path)) if quantizer else leaf

    packed = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, pack))(params)
    assert len(jax.tree.leaves(packed)) == len(jax.tree.leaves(params)) + 9
    training, inference = embed(CLIP(CONFIG, RULES), params), embed(CLIP(CONFIG, RULES), packed)
    for left, right, latent in zip(training[:2], inference[:2], embed(CLIP(CONFIG), params), strict=False):
        np.testing.assert_array_equal(left, right)
        assert not np.allclose(left, latent, atol=0.01)


def test_bfloat16_computes_float32_embeddings_of_length_one(params: Params) -> None:
    *narrow, scale = embed(CLIP(CONFIG, dtype=jnp.bfloat16), params)
    np.testing.assert_allclose(scale, np.exp(np.float64(params["logit_scale"])), rtol=1e-6)
    for embeddings, wide in zip(narrow, embed(CLIP(CONFIG), params), strict=False):
        assert embeddings.shape == (3, 24) and embeddings.dtype == wide.dtype == scale.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(np.float64(embeddings), axis=-1), 1, atol=1e-6)
        assert (np.sum(embeddings * wide, axis=-1) > 0.999).all()
        assert not np.array_equal(embeddings, wide)


def test_text_after_the_end_token_is_not_seen(params: Params) -> None:
    changed = TOKENS.copy()
    changed[0, 4:], changed[1, 2:] = 7, 8
    before, after = (
        jax.jit(functools.partial(CLIP(CONFIG).apply, method="encode_text"))({"params": params}, tokens)
        for tokens in (TOKENS, changed)
    )
    np.testing.assert_array_equal(before, after)
