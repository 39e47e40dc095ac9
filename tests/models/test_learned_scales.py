"""Learned scales, a ternary patch embedding and blended weights, from initialisation to artifact and open_clip."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.inspection import ternary_share
from tclip_jax.artifacts.pack import flatten
from tclip_jax.artifacts.verify import verify_artifact
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.open_clip import from_open_clip, to_open_clip
from tclip_jax.models.clip import CLIP, init_params, param_shapes, with_learned_scales
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.layers import Softness, blend_params
from tclip_jax.models.summary import parameter_rows, parameter_table
from tclip_jax.models.ternary_rules import (
    ATTENTION,
    MLP,
    PATCH_EMBEDDING,
    TOKEN_EMBEDDING,
    TernaryRules,
    is_learned_scale,
    ternary_rules,
)
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.sharding import partition_spec, path_of
from tclip_jax.ternary import Quantizer, TernaryTensor
from tclip_jax.training.optimizer import decays

CONFIG = CLIPConfig(
    8,
    VisionConfig((16, 16), patch_size=8, width=32, layers=2, head_width=16),
    TextConfig(context_length=6, vocab_size=48, width=16, heads=2, layers=1),
)
RULES = (
    (MLP, Quantizer(group=32, kind="lsq")),
    (ATTENTION, Quantizer(group="channel", kind="seq")),
    (TOKEN_EMBEDDING, Quantizer(group=8, kind="lsq")),
    (PATCH_EMBEDDING, Quantizer(group=64, kind="seq")),
)
MODEL = CLIP(CONFIG, RULES)
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((4, 16, 16, 3), np.float32)
TOKENS = RNG.integers(0, 48, (4, 6), np.int32)


@pytest.fixture(autouse=True)
def fast_compilation() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def latent() -> dict[str, Any]:
    return jax.device_get(jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0)))


@functools.cache
def forward() -> Any:
    return jax.jit(lambda params: MODEL.apply({"params": params}, IMAGES, TOKENS)[:2])


def test_scales_lie_beside_their_weights_and_start_from_them() -> None:
    params = latent()
    scales = {path: leaf.shape for path, leaf in flatten(params).items() if path.endswith(("l_scale", "g_scale"))}
    assert scales == {
        "image/patch_embedding/kernel_scale": (3, 32),
        "image/blocks/attention/qkv/kernel_scale": (2, 1, 96),
        "image/blocks/attention/out/kernel_scale": (2, 1, 32),
        "image/blocks/mlp/fc1/kernel_scale": (2, 1, 128),
        "image/blocks/mlp/fc2/kernel_scale": (2, 4, 32),
        "text/token_embedding/embedding_scale": (48, 2),
        "text/blocks/attention/qkv/kernel_scale": (1, 1, 48),
        "text/blocks/attention/out/kernel_scale": (1, 1, 16),
        "text/blocks/mlp/fc1/kernel_scale": (1, 1, 64),
        "text/blocks/mlp/fc2/kernel_scale": (1, 2, 16),
    }
    qkv = params["image"]["blocks"]["attention"]["qkv"]
    np.testing.assert_array_equal(qkv["kernel_scale"][:, 0], np.abs(qkv["kernel"]).max(1))
    fc1 = params["image"]["blocks"]["mlp"]["fc1"]
    np.testing.assert_allclose(fc1["kernel_scale"][:, 0], 2 * np.abs(fc1["kernel"]).mean(1), rtol=1e-6)
    # Weights without scales get the same scales; existing scales are kept.
    floats = {path: leaf for path, leaf in flatten(params).items() if not is_learned_scale(path)}
    floats = unflatten_dict(floats, sep="/")
    assert jax.eval_shape(lambda: floats) == param_shapes(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, with_learned_scales(floats, RULES), params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    jax.tree.map(np.testing.assert_array_equal, with_learned_scales(doubled, RULES), doubled)
    assert jax.eval_shape(lambda: params) == param_shapes(CONFIG, RULES)


def test_packed_and_exported_the_model_says_the_same(tmp_path: pathlib.Path) -> None:
    params = latent()
    expected = forward()(params)
    packed = pack_params(params, RULES)
    assert flatten(packed).keys() == flatten(param_shapes(CONFIG)).keys()
    assert sum(isinstance(leaf, TernaryTensor) for leaf in flatten(packed).values()) == 10
    jax.tree.map(np.testing.assert_array_equal, forward()(packed), expected)
    preprocess = Preprocess(16)
    write_artifact(tmp_path / "a", config=CONFIG, preprocess=preprocess, params=packed, rules=RULES)
    verify_artifact(tmp_path / "a", params, RULES)
    artifact = read_artifact(tmp_path / "a")
    assert artifact.rules == RULES and artifact.params["image"]["patch_embedding"]["kernel"].shape == (192, 32)
    # A model without rules computes the same embeddings from the exported floats.
    state = to_open_clip(packed, CONFIG)
    assert state["visual.conv1.weight"].shape == (32, 3, 8, 8)
    floats = from_open_clip(state, CONFIG)
    for ours, theirs in zip(jax.jit(CLIP(CONFIG).apply)({"params": floats}, IMAGES, TOKENS)[:2], expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert to_open_clip(params, CONFIG).keys() == state.keys()  # the export of latent weights has no learned scales


def test_learned_scales_are_sharded_like_their_weights_and_do_not_decay() -> None:
    mesh, shapes = make_mesh(4, 2), param_shapes(CONFIG, RULES)
    decayed = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decays({"clip": shapes}))}
    leaves = flatten(shapes)
    for path, leaf in leaves.items():
        weight = path.removesuffix("_scale")
        if path == weight or path == "logit_scale":
            continue
        ours, its = (partition_spec(name, leaves[name].shape, mesh) for name in (path, weight))
        sharded = -2 if "embedding_scale" in path else -1
        assert (ours[sharded], its[sharded]) == ("fsdp", "fsdp") and len(ours) == leaf.ndim, path
        assert decayed[f"clip/{weight}"] and not decayed[f"clip/{path}"]


def test_the_table_shows_scales_and_does_not_count_them() -> None:
    rows = parameter_rows(param_shapes(CONFIG, RULES), RULES, make_mesh(4, 2))
    assert {row["quantizer"] for row in rows} == {
        "",
        "lsq group=32",
        "lsq group=8",
        "seq group=channel",
        "seq group=64",
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(CONFIG)))
    share = f"{ternary_share(pack_params(latent(), RULES)):.2%}"
    line = next(line for line in parameter_table(rows).splitlines() if line.startswith("all parameters"))
    assert f"{total:,}," in line and share in line


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_blended_weights_go_from_float_to_ternary(share: float) -> None:
    params = latent()
    blended = forward()(blend_params(params, RULES, Softness(jnp.float32(share))))
    if share == 0.5:
        gradient = jax.jit(
            jax.grad(lambda w: jnp.sum(forward()(blend_params(w, RULES, Softness(jnp.float32(share))))[0])),
        )(params)
        assert all(np.any(leaf) for path, leaf in flatten(gradient).items() if path.startswith("image/blocks/mlp"))
        return
    ends = {0.0: jax.jit(CLIP(CONFIG).apply)({"params": params}, IMAGES, TOKENS)[:2], 1.0: forward()(params)}
    compare = np.testing.assert_array_equal if share else functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(compare, blended, ends[share])


def test_while_trits_are_soft_integers_of_other_weights_are_hard() -> None:
    """A rule for 4 bits beside soft trits; with a temperature of 0 everything is hard."""
    rules = ternary_rules([(".*/mlp/.*", Quantizer(kind="uniform", bits=4)), (".*", Quantizer(group=8))], Quantizer())
    params = latent()

    def outputs(temperature: float, rules: TernaryRules) -> Any:
        softness = Softness(jnp.float32(1), jnp.float32(temperature))
        return jax.jit(CLIP(CONFIG, rules).apply)({"params": blend_params(params, rules, softness)}, IMAGES, TOKENS)[:2]

    hard = jax.jit(CLIP(CONFIG, rules).apply)({"params": params}, IMAGES, TOKENS)[:2]
    jax.tree.map(np.testing.assert_array_equal, outputs(0.0, rules), hard)
    assert np.any(outputs(0.4, rules)[0] != hard[0])
    integers = rules[:1]
    hard = jax.jit(CLIP(CONFIG, integers).apply)({"params": params}, IMAGES, TOKENS)[:2]
    jax.tree.map(np.testing.assert_array_equal, outputs(0.4, integers), hard)
