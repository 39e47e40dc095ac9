"""`Build` gives plans and training the same shapes and the same program."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.inference.load import Architecture
from tclip_jax.inference.model import Model
from tclip_jax.models import attention, attention_tpu
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.config import run_config
from tclip_jax.ternary import Quantizer
from tclip_jax.training import build
from tclip_jax.training.build import Build, check_batch, teacher_params


def described(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.slow
def test_shapes_match_the_arrays_and_compile_to_the_same_program(config: ml_collections.ConfigDict) -> None:
    config.ternary, config.teacher = "Q-ALL", "somewhere"
    config.loss.update({"crd": 1.0, "icl": 1.0})
    config.optimizer.ema_decay = 0.9
    run, mesh = run_config(config), make_mesh(4, 2)
    params = init_params(CLIP(run.model), jax.random.key(1))
    with jax.set_mesh(mesh):
        real = Build(run, mesh, Model(run.model, run.preprocess, params))
        planned = Build(run, mesh, Architecture(run.model, run.preprocess))
        state = real.init_state()
        assert described(planned.state_shapes) == described(state)
        source = open_source(run.data.source, run.data.split)
        data = train_iterator(
            source,
            tokenizer=Tokenizer(run.model.text.context_length),
            preprocess=run.preprocess,
            augment="none",
            templates="digits",
            batch_size=8,
            seed=0,
            process_index=0,
            process_count=1,
        )
        batch = shard_batch(next(data), mesh)
        assert described(planned.batch_shapes) == described(batch)
        teacher = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, planned.teacher_shapes))
        assert described(planned.teacher_shapes) == described(teacher)
        shapes = planned.state_shapes, planned.batch_shapes, planned.teacher_shapes
        programs = [
            each.jitted_step(arguments[0]).lower(*arguments).as_text()
            for each, arguments in ((planned, shapes), (real, (state, batch, teacher)))
        ]
    assert programs[0] == programs[1]


def test_each_model_normalizes_pixels_with_its_own_statistics(
    config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.teacher = "somewhere"
    run, mesh, made = run_config(config), make_mesh(8), []
    halves = dataclasses.replace(run.preprocess, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.5))
    monkeypatch.setattr(build, "make_train_step", lambda student, teacher, *rest: made.extend((student, teacher)))
    monkeypatch.setattr(jax, "jit", lambda step, **options: step)
    with jax.set_mesh(mesh):
        Build(run, mesh, Architecture(run.model, halves)).jitted_step(None)
    assert [(each.mean, each.std) for each in made] == [(x.mean, x.std) for x in (run.preprocess, halves)]


def test_a_batch_with_cached_teacher_embeddings(config: ml_collections.ConfigDict) -> None:
    config.data.teacher_cache, config.loss.fd = "somewhere", 1.0
    run, mesh = run_config(config), make_mesh(8)
    cache = TeacherCache("somewhere", "", "", 24, 50.0, 100, 1, 0, 4096, {})
    build = Build(run, mesh, cache)
    with jax.set_mesh(mesh):
        assert build.teacher_shapes is None
        shapes = build.batch_shapes
        assert shapes["teacher_image"].shape == (8, 24) and shapes["teacher_text"].dtype == np.float16
        assert build.state_shapes.params["heads"]["image"]["kernel"].shape == (16, 24)


def test_a_batch_that_is_not_divisible_is_refused(config: ml_collections.ConfigDict) -> None:
    config.data.batch_size = 12
    with pytest.raises(ValueError, match="global batch 12 is not divisible by 8 devices"):
        check_batch(run_config(config), make_mesh(8))


@pytest.mark.slow
def test_a_teacher_in_bfloat16_has_the_same_embeddings_to_the_bit(config: ml_collections.ConfigDict) -> None:
    run = run_config(config)
    rules = ternary_rules("Q-FFN", Quantizer(group=16))
    params = init_params(CLIP(run.model), jax.random.key(1))
    narrow = teacher_params(params, rules, dataclasses.replace(run, dtype="bfloat16"))
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(narrow)}
    assert {name for name, leaf in leaves.items() if leaf.dtype == np.float32 and leaf.ndim > 2} == {
        f"{tower}/blocks/mlp/{layer}/kernel" for tower in ("image", "text") for layer in ("fc1", "fc2")
    }  # latent weights, whose trits would change
    assert leaves["text/token_embedding/embedding"].dtype == jnp.bfloat16
    assert leaves["image/position_embedding"].dtype == leaves["text/blocks/ln_1/scale"].dtype == np.float32
    size = run.model.vision.image_size
    inputs = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32), np.full((2, 8), 3, np.int32)
    model = CLIP(run.model, rules, jnp.bfloat16)
    expected, actual = (model.apply({"params": each}, *inputs)[:2] for each in (params, narrow))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_teacher_in_int8_is_near_and_sharded(config: ml_collections.ConfigDict) -> None:
    config.teacher, config.teacher_int8 = "somewhere", True
    config.loss.crd = 1.0
    run, mesh = run_config(config), make_mesh(2, 2, 2)
    params = init_params(CLIP(run.model), jax.random.key(1))
    rounded = teacher_params(params, (), run)
    size = run.model.vision.image_size
    inputs = np.random.default_rng(0).normal(size=(8, *size, 3)).astype(np.float32), np.full((8, 8), 3, np.int32)
    model = CLIP(run.model)
    expected, alone = (model.apply({"params": each}, *inputs)[:2] for each in (params, rounded))
    for near, exact in zip(alone, expected, strict=True):
        assert 0.99 < np.sum(near * exact, -1).min() < 0.99999
    with jax.set_mesh(mesh):
        shapes = Build(run, mesh, Architecture(run.model, run.preprocess)).teacher_shapes
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), rounded
        )
        kernel = shapes["image"]["blocks"]["mlp"]["fc1"]["kernel"]
        assert kernel.int8.dtype == jnp.int8 and kernel.int8.sharding.spec == PartitionSpec(
            None, None, ("tensor", "fsdp")
        )
        placed = jax.device_put(rounded, jax.tree.map(lambda leaf: leaf.sharding, shapes))
        sharded = jax.jit(lambda params: model.apply({"params": params}, *inputs)[:2])(placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded, alone)


def test_int8_shares_queries_keys_and_values_over_tensor(config: ml_collections.ConfigDict) -> None:
    config.teacher, config.teacher_int8 = "somewhere", True
    config.loss.crd = 1.0
    run, mesh = run_config(config), make_mesh(1, 1, 2, devices=jax.devices()[:2])
    model, size = CLIP(run.model), run.model.vision.image_size
    with jax.set_mesh(mesh):
        shapes = Build(run, mesh, Architecture(run.model, run.preprocess)).teacher_shapes
        inputs = jax.ShapeDtypeStruct((8, *size, 3), np.float32), jax.ShapeDtypeStruct((8, 8), np.int32)
        encode = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs)[:2])
        text = encode.lower(shapes, *inputs).compile().as_text()
    width, dots = run.model.vision.width, re.findall(r"s32\[[\d,]*\]\S* dot\(", text)
    assert dots and not [dot for dot in dots if f",{3 * width}]" in dot]


def test_a_ternary_teacher_has_nothing_to_round(config: ml_collections.ConfigDict) -> None:
    config.teacher, config.teacher_int8 = "somewhere", True
    config.loss.crd = 1.0
    run = run_config(config)
    rules = ternary_rules("Q-ALL", Quantizer(group=16))
    with pytest.raises(ValueError, match=r"config\.teacher_int8: the matrices of the teacher's blocks are ternary"):
        teacher_params(init_params(CLIP(run.model), jax.random.key(1)), rules, run)


def test_a_forced_attention_needs_no_whole_batch_to_initialize(
    config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, attention_tpu):
        monkeypatch.setattr(module, "traced_device", lambda: ("TPU v5 lite", "tpu"))
    config.attention = "mosaic_tpu"
    mesh, run = make_mesh(4, 2), run_config(config)
    with jax.set_mesh(mesh):
        assert Build(run, mesh, None).state_shapes.params["clip"]


def test_int8_needs_a_teacher_in_the_step(config: ml_collections.ConfigDict) -> None:
    config.teacher_int8 = True
    with pytest.raises(ValueError, match=r"config\.teacher_int8 needs config.teacher: a teacher that runs in the step"):
        run_config(config)


@pytest.mark.slow
def test_a_trace_names_the_modules(config: ml_collections.ConfigDict) -> None:
    """xprof shows the names of operations: models, towers, attention, quantizers, gathers, losses and the optimizer."""
    config.ternary, config.teacher = "Q-ALL", "somewhere"
    config.loss.update({"crd": 1.0, "hidden": 1.0})
    config.optimizer.ema_decay = 0.9
    run, mesh = run_config(config), make_mesh(4, 2)
    planned = Build(run, mesh, Architecture(run.model, run.preprocess))
    shapes = planned.state_shapes, planned.batch_shapes, planned.teacher_shapes
    with jax.set_mesh(mesh):
        text = planned.jitted_step(shapes[0]).lower(*shapes).compile().as_text()
    names = set(re.findall(r'op_name="([^"]*)"', text))

    def named(*parts: str) -> bool:
        """Whether an operation has these scopes in this order; each may be wrapped, as in jvp(student)."""
        pattern = re.compile(".*".join(rf"(?<![\w.]){part}(?![\w.])" for part in parts))
        return any(map(pattern.search, names))

    for model in ("student", "teacher"):
        for tower in ("image", "text"):
            assert named(model, tower, "blocks", "attention", "attend"), (model, tower)
            assert named(model, tower, "blocks", "mlp", "fc1"), (model, tower)
    assert named("student", "image", "blocks", "mlp", "quantize", "gather")
    assert named("student", "text", "token_embedding", "quantize", "gather")
    assert named("teacher", "image", "blocks", "gather") and not named("teacher", "quantize")
    assert named("losses", "crd") and named("losses", "hidden") and not named("losses", "quantize")
    assert named("optimizer") and named("average") and not named("optimizer", "losses")
