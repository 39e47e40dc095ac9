"""Microbatches and ring losses have the values and gradients of the whole batch on one device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tclip_jax.losses.grad_cache import gradient_in_parts
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.layers import Softness
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import BATCH_AXES, make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import LossConfig, run_config
from tclip_jax.ternary import Quantizer
from tclip_jax.training.objective import Encoders, Objective, init_heads

CONFIG = CLIPConfig(
    16, VisionConfig((16, 16), patch_size=8, width=16, layers=1, head_width=8), TextConfig(6, 32, 16, 2, 1)
)
TEACHER = CLIPConfig(24, CONFIG.vision, CONFIG.text)
STUDENT = Encoders(CLIP(CONFIG, ternary_rules("Q-ALL", Quantizer(group=8))), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
IN_STEP = Encoders(CLIP(TEACHER), (0.5,) * 3, (0.5,) * 3)
TERMS = {"task": 1.0, "crd": 0.5, "icl": 0.25, "fd": 2.0, "open_clip": 0.75, "affinity": 0.5, "kl": 1.5}
OF_LAYERS = {"hidden": 0.7, "relations": 0.9, "relation_heads": 2, "layers": (0,)}
ROWS = 16
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, (ROWS, 16, 16, 3), np.uint8),
    "tokens": RNG.integers(0, 3, (ROWS, 6), np.int32),
    # Masked samples: a few everywhere, and all of one part.
    "weight": np.float32([0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]),
    "teacher_image": np.float16(RNG.normal(size=(ROWS, 24))) / np.float16(5),
    "teacher_text": np.float16(RNG.normal(size=(ROWS, 24))) / np.float16(5),
}
BATCH["tokens"][::5] = BATCH["tokens"][1]  # repeated captions
BATCH["tokens"][np.arange(ROWS), RNG.integers(1, 6, ROWS)] = 31  # the ends of texts, so their lengths differ


def loss_config(teacher: str, **changes: Any) -> LossConfig:
    of_layers = OF_LAYERS if teacher == "in the step" else {}
    return LossConfig(**TERMS, **of_layers, positives="equal_text", **changes)  # type: ignore[arg-type]


@functools.cache
def params() -> tuple[Any, Any]:
    heads = init_heads(jax.random.key(2), CONFIG, TEACHER, loss_config("in the step"))
    draw = jax.jit(init_params, static_argnums=0)
    return {"clip": draw(STUDENT.model, jax.random.key(0)), "heads": heads}, draw(IN_STEP.model, jax.random.key(1))


@functools.cache
def gradients(teacher: str, mesh: Mesh | None, parts: int, distributed: str) -> tuple[Any, Any]:
    loss = loss_config(teacher, distributed=distributed, ring_chunk=1)
    objective = Objective(STUDENT, IN_STEP if teacher == "in the step" else 20.0, loss)

    def run(params: Any, teacher_params: Any, batch: Any) -> Any:
        return gradient_in_parts(
            lambda params, rows: objective.encode(params, teacher_params, rows, batch, Softness(jnp.float32(0.5))),
            lambda params, *encoded: objective.loss(params, teacher_params, batch, *encoded),
            params,
            batch,
            parts,
            BATCH_AXES,
        )

    if mesh is None:
        return jax.device_get(jax.jit(run)(*params(), BATCH))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), tree_shardings(params(), mesh))
        return jax.device_get(jax.jit(run)(*placed, shard_batch(BATCH, mesh)))


@pytest.mark.parametrize(
    ("teacher", "sizes", "parts", "distributed"),
    [
        pytest.param("in the step", None, 4, "gather", marks=pytest.mark.slow),
        pytest.param("in the step", (2, 2, 2), 2, "ring", marks=pytest.mark.slow),
        pytest.param("cached", (4, 2, 1), 2, "gather", marks=pytest.mark.slow),
    ],
)
def test_parts_have_the_loss_and_the_gradients_of_the_whole_batch(
    teacher: str, sizes: tuple[int, int, int] | None, parts: int, distributed: str
) -> None:
    whole, metrics = gradients(teacher, None, 1, "gather")
    ours, our_metrics = gradients(teacher, sizes and make_mesh(*sizes), parts, distributed)
    assert our_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(our_metrics[name], value, rtol=5e-6, err_msg=name)
    for path, expected in flatten_dict(whole, sep="/").items():
        tolerance = 1e-5 * max(np.abs(expected).max(), 1e-2)
        np.testing.assert_allclose(flatten_dict(ours, sep="/")[path], expected, rtol=0, atol=tolerance, err_msg=path)


def test_rows_of_parts_stay_on_their_devices() -> None:
    """A part consists of the next rows of every device, and the step is traced once for all parts."""
    shapes: list[tuple[int, ...]] = []

    def embed(scale: jax.Array, rows: Any) -> Any:
        shapes.append(rows["x"].shape)
        return scale * rows["x"], jnp.sum(rows["x"])

    def loss(scale: jax.Array, rows: jax.Array, sums: jax.Array) -> Any:
        return jnp.sum(rows * jnp.arange(16.0)) + scale * sums, (rows, sums)

    mesh, x = make_mesh(4, 2), np.arange(16, dtype=np.float32) ** 2
    with jax.set_mesh(mesh):
        run = jax.jit(lambda scale, batch: gradient_in_parts(embed, loss, scale, batch, 2, BATCH_AXES))
        batch = shard_batch({"x": x}, mesh)
        gradient, (rows, sums) = run(jnp.float32(3), batch)
        program = run.lower(jnp.float32(3), batch).compile().as_text()
    assert set(shapes) == {(8,)}
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(rows, 3 * x)
    assert sums == x.sum() and gradient == np.sum(x * np.arange(16)) + x.sum()


def test_parts_that_do_not_divide_the_batch_are_refused(config: ml_collections.ConfigDict) -> None:
    config.data.microbatches = 3
    with pytest.raises(ValueError, match=r"config\.data\.batch_size 8 is not divisible by .*microbatches 3"):
        run_config(config)
    config.data.microbatches = 0
    with pytest.raises(ValueError, match=r"config\.data\.microbatches is 0: it must be at least 1"):
        run_config(config)
    config.data.microbatches, config.loss.ring_chunk = 1, 0
    with pytest.raises(ValueError, match=r"config\.loss\.ring_chunk is 0: it must be at least 1"):
        run_config(config)
    mesh = make_mesh(4, 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="the 1 rows of a device are not divisible by 2 micro"):
        batch = shard_batch({"x": np.ones(8, np.float32)}, mesh)
        gradient_in_parts(lambda p, b: (b["x"], 0.0), lambda p, r, s: (p, None), jnp.float32(1), batch, 2, BATCH_AXES)
