"""A sharded model: which arrays its gradient sends between devices, and that it equals the model of one device."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tclip_jax.models.clip import CLIP, init_params, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import batch_sharding, make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.ternary import Quantizer

# Five image tokens and seven text tokens: no weight has an axis of these sizes.
CONFIG = CLIPConfig(
    16,
    VisionConfig((16, 16), patch_size=8, width=48, layers=2, head_width=12),
    TextConfig(context_length=7, vocab_size=128, width=32, heads=4, layers=2),
)
TOKENS = {5, 7}
ROWS = 16
COLLECTIVE = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def collectives(mesh: Mesh) -> list[tuple[str, str, tuple[int, ...]]]:
    """Returns (operation, dtype, shape) of every array that the gradient of a ternary model communicates."""
    model = CLIP(CONFIG, ternary_rules("Q-ALL", Quantizer(group=8)), remat=True)

    def total(params: object, images: jax.Array, tokens: jax.Array) -> jax.Array:
        return sum(jnp.sum(each**2) for each in model.apply({"params": params}, images, tokens))

    shapes = param_shapes(CONFIG)
    shardings = tree_shardings(shapes, mesh)
    rows = batch_sharding(mesh)
    batch = [jax.ShapeDtypeStruct((ROWS, 16, 16, 3), np.float32), jax.ShapeDtypeStruct((ROWS, 7), np.int32)]
    gradient = jax.jit(jax.grad(total), in_shardings=(shardings, rows, rows), out_shardings=shardings)
    with jax.set_mesh(mesh):
        text = gradient.lower(shapes, *batch).compile().as_text()
    return [
        (operation, dtype, tuple(int(size) for size in sizes.split(",") if size))
        for result, operation in re.findall(COLLECTIVE, text)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def block_gathers(width: int, each: int) -> set[tuple[int, ...]]:
    """Returns the shapes in which a block's four weights are gathered, with one entry per `each` inputs."""
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {(k // each, n) for k, n in shapes}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 2, 1)])
def test_weights_are_gathered_packed_and_activations_are_not(
    sizes: tuple[int, int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    sent = collectives(make_mesh(*sizes))
    gathered = {(dtype, shape) for operation, dtype, shape in sent if operation == "all-gather"}
    packed = {shape for dtype, shape in gathered if dtype == "u8"}
    assert packed == block_gathers(48, 4) | block_gathers(32, 4) | {(128, 8)}
    # CPUs have no bfloat16 collectives: a scale has four bytes here, and two on a TPU.
    scales = block_gathers(48, 8) | block_gathers(32, 8) | {(128, 4)}
    floats = {(192, 48), (48, 16), (32, 16)}  # the patch embedding and two projections
    assert {shape for dtype, shape in gathered if dtype != "u8"} == scales | floats
    # Gradients have the shapes of weights, and no array has an axis of tokens.
    assert {operation for operation, *_ in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert not [each for each in sent if len(each[2]) > 2 and TOKENS & set(each[2])]
    assert "rematerialization" not in capfd.readouterr().err


# All heads and hidden units are divisible by four devices along `tensor`.
TENSOR_CONFIG = CLIPConfig(
    16,
    VisionConfig((16, 16), patch_size=8, width=64, layers=2, head_width=16),
    TextConfig(context_length=7, vocab_size=128, width=32, heads=4, layers=2),
)
MODEL = CLIP(TENSOR_CONFIG, ternary_rules("Q-ALL", Quantizer(group=8)))


def total(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    image, text, _ = MODEL.apply({"params": params}, batch["image"], batch["tokens"])
    return jnp.sum(jnp.sin(3 * image) + jnp.cos(3 * text)), (image, text)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_embeddings_and_gradients_equal_those_of_one_device(sizes: tuple[int, int, int]) -> None:
    rng, params = np.random.default_rng(0), init_params(MODEL, jax.random.key(0))
    batch = {
        "image": rng.normal(0, 1, (16, 16, 16, 3)).astype(np.float32),
        "tokens": rng.integers(0, 128, (16, 7), np.int32),
    }
    expected, expected_embeddings = jax.jit(jax.grad(total, has_aux=True))(params, batch)
    mesh = make_mesh(*sizes)
    shardings = tree_shardings(params, mesh)
    gradient = jax.jit(jax.grad(total, has_aux=True), out_shardings=(shardings, None))
    with jax.set_mesh(mesh):
        actual, embeddings = gradient(jax.device_put(params, shardings), shard_batch(batch, mesh))
    for x, y in zip(embeddings, expected_embeddings, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for (path, y), x in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
        error = np.linalg.norm(np.float64(x) - np.float64(y))
        assert error <= 1e-5 * np.linalg.norm(y), jax.tree_util.keystr(path)
