"""What a compiled step sends between devices: trits and scales, float weights by layer, and never activations."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import batch_sharding, make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.ternary import Quantizer

# Five image tokens and seven of text: no weight has such an axis.
CONFIG = CLIPConfig(
    16,
    VisionConfig((16, 16), patch_size=8, width=48, layers=2, head_width=12),
    TextConfig(context_length=7, vocab_size=128, width=32, heads=4, layers=2),
)
TOKENS = {5, 7}
ROWS = 16
COLLECTIVE = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
Found = list[tuple[str, str, tuple[int, ...]]]


def collectives(mesh: Mesh) -> Found:
    """(operation, dtype, shape) of every array that the gradient of a ternary model sends."""
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
    """Shapes of what the four weights of a block are moved as, with one entry for `each` so many inputs."""
    shapes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return {(k // each, n) for k, n in shapes}


@pytest.mark.parametrize("sizes", [(4, 2, 1)])
def test_weights_move_packed_and_activations_stay(
    sizes: tuple[int, int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    found = collectives(make_mesh(*sizes))
    gathered = {(dtype, shape) for operation, dtype, shape in found if operation == "all-gather"}
    packed = {shape for dtype, shape in gathered if dtype == "u8"}
    assert packed == block_gathers(48, 4) | block_gathers(32, 4) | {(128, 8)}
    # CPUs have no collectives of bfloat16: a scale has four bytes here, and two on a TPU.
    scales = block_gathers(48, 8) | block_gathers(32, 8) | {(128, 4)}
    floats = {(192, 48), (48, 16), (32, 16)}  # the patch embedding and two projections
    assert {shape for dtype, shape in gathered if dtype != "u8"} == scales | floats
    # A gradient is as large as its weight, and nothing has rows and tokens.
    assert {operation for operation, *_ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert not [each for each in found if len(each[2]) > 2 and TOKENS & set(each[2])]
    assert "rematerialization" not in capfd.readouterr().err
