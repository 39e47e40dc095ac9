"""The training loop: one for full precision and ternary, with and without a teacher, on one device or many."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from tclip_jax.artifacts.model import Model
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.models.trits import look, trit_metrics
from tclip_jax.parallel.mesh import describe_run, make_mesh, shard_batch
from tclip_jax.parallel.rules import tree_shardings
from tclip_jax.storage import write_atomic
from tclip_jax.training.build import Build, check_batch
from tclip_jax.training.checkpoints import Checkpoints, saved_steps
from tclip_jax.training.config import RunConfig, base_config, run_config
from tclip_jax.training.evaluation import Evaluation
from tclip_jax.training.initial import start_params
from tclip_jax.training.optimizer import learning_rate_schedule
from tclip_jax.training.restore import load_model
from tclip_jax.training.state import TrainState
from tclip_jax.training.teacher_cache import open_cache
from tclip_jax.training.telemetry import Telemetry

_logger = logging.getLogger(__name__)


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Model:
    """Trains to `config.steps`, going on from the newest checkpoint in `workdir` if there is one.

    Leaves in `workdir`: config.json (resolved), checkpoints/, metrics.jsonl, tensorboard/.

    Returns:
      The trained model, its weights latent.

    Raises:
      ValueError: an impossible configuration, or a workdir that holds another model's run.
    """
    run, workdir = run_config(config), epath.Path(workdir)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.slices)
    check_batch(run, mesh)
    for line in describe_run(mesh, run.data.batch_size):
        _logger.info("%s", line)
    cache = open_cache(run) if run.data.teacher_cache else None
    data = train_iterator(
        open_source(run.data.source, run.data.split),
        tokenizer=Tokenizer(run.model.text.context_length),
        preprocess=run.preprocess,
        augment=run.data.augment,
        templates=run.data.templates,
        batch_size=run.data.batch_size,
        seed=run.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=run.data.workers,
        cache=cache,
    )
    teacher = load_model(run.teacher, mesh) if run.teacher else None
    build = Build(run, mesh, teacher or cache)
    start = None if saved_steps(workdir / "checkpoints") else start_params(run, mesh)
    evaluations = [Evaluation(each) for each in (run.eval, *run.evals) if each.source]
    _write_config(config, workdir)

    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", run.checkpoint) as checkpoints:
        state = build.init_state(start)
        state = checkpoints.restore(state, data) or state
        teacher_params = teacher and jax.device_put(teacher.params, tree_shardings(teacher.params, mesh))
        step_function = build.jitted_step(state)
        schedule, first = learning_rate_schedule(run.optimizer, run.steps), int(state.step)
        with Telemetry(workdir, first_step=first, steps=run.steps, title=workdir.name) as telemetry:
            previous: tuple[int, dict[str, Any]] | None = None
            started = time.perf_counter()
            for step in range(first, run.steps):
                batch = shard_batch(next(data), mesh)
                looks = run.rules and run.telemetry_every and (step + 1) % run.telemetry_every == 0
                before = look(state.params["clip"], run.rules) if looks else {}
                state, metrics = step_function(state, batch, teacher_params)
                # Reading a step's metrics waits for it: one step late, the device is never kept waiting.
                if previous is not None:
                    telemetry.write(*previous)
                now = time.perf_counter()
                rate = run.data.batch_size / (now - started)
                started = now
                previous = step + 1, metrics | {"learning_rate": schedule(step), "images_per_second": rate}
                if looks:
                    telemetry.write_trits(step + 1, trit_metrics(before, state.params["clip"], run.rules))
                checkpoints.save(step + 1, state, data)
                due = [each for each in evaluations if each.is_due(step + 1) and step + 1 < run.steps]
                if due:
                    telemetry.write(*previous)
                    previous = None
                    _evaluate(due, telemetry, step + 1, run, state, mesh)
                    started = time.perf_counter()
            if previous is not None:
                telemetry.write(*previous)
                checkpoints.save(run.steps, state, data, force=True)
                _evaluate(evaluations, telemetry, run.steps, run, state, mesh)
    return Model(run.model, run.preprocess, state.params["clip"], run.rules)


def _evaluate(
    evaluations: Sequence[Evaluation], telemetry: Telemetry, step: int, run: RunConfig, state: TrainState, mesh: Mesh
) -> None:
    """Of the weights and of their average, which is made ternary again and whose metrics end in `_of_average`."""
    for each in evaluations:
        metrics = each(Model(run.model, run.preprocess, state.params["clip"], run.rules), mesh)
        if state.average is not None:
            of_average = each(Model(run.model, run.preprocess, state.average, run.rules), mesh)
            metrics |= {f"{name}_of_average": value for name, value in of_average.items()}
        telemetry.write(step, metrics)


def _write_config(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
    """Writes config.json; a run that is gone on with must be of the same model."""
    if jax.process_index():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path, resolved = workdir / "config.json", json.loads(config.to_json())
    if path.exists():
        saved = json.loads(base_config().to_json()) | json.loads(path.read_text())  # a key may be newer than the run
        for key in ("model", "ternary", "quantizer", "seed", "init", "init_scales", "inherit"):
            was = saved[key]
            if was != resolved[key]:
                raise ValueError(
                    f"{path}: this run has config.{key} = {was}, not {resolved[key]}: choose another workdir"
                )
    write_atomic(path, json.dumps(resolved, indent=2) + "\n")
