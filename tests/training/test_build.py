"""`Build` gives plans and training the same shapes and the same program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.runs.config import run_config
from tclip_jax.training import build
from tclip_jax.training.build import Architecture, Build, check_batch


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
