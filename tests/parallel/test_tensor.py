"""Devices along `tensor` share products: the model says and learns what it does on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.ternary import Quantizer

CONFIG = CLIPConfig(
    16,
    VisionConfig((16, 16), patch_size=8, width=64, layers=2, head_width=16),
    TextConfig(context_length=7, vocab_size=128, width=32, heads=4, layers=2),
)
MODEL = CLIP(CONFIG, ternary_rules("Q-ALL", Quantizer(group=8)))


def total(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    image, text, _ = MODEL.apply({"params": params}, batch["image"], batch["tokens"])
    return jnp.sum(jnp.sin(3 * image) + jnp.cos(3 * text)), (image, text)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 2, 4), marks=pytest.mark.slow)])
def test_embeddings_and_gradients_are_those_of_one_device(sizes: tuple[int, int, int]) -> None:
    rng, params = np.random.default_rng(0), init_params(MODEL, jax.random.key(0))
    batch = {
        "image": rng.normal(0, 1, (16, 16, 16, 3)).astype(np.float32),
        "tokens": rng.integers(0, 128, (16, 7), np.int32),
    }
    expected, embeddings = jax.jit(jax.grad(total, has_aux=True))(params, batch)
    mesh = make_mesh(*sizes)
    shardings = tree_shardings(params, mesh)
    gradient = jax.jit(jax.grad(total, has_aux=True), out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        actual, ours = gradient(jax.device_put(params, shardings), shard_batch(batch, mesh))
    for one, other in zip(embeddings, ours, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        error = np.linalg.norm(np.float64(other) - np.float64(one))
        assert error <= 1e-5 * np.linalg.norm(one), jax.tree_util.keystr(path)
