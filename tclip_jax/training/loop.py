"""The training loop: one for full precision and ternary, with and without a teacher, on one device or many."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.sources import FAULTS, described, open_source
from tclip_jax.data.teacher_cache import TeacherCache
from tclip_jax.inference.load import load_known
from tclip_jax.inference.model import Model
from tclip_jax.models.flops import train_flops
from tclip_jax.models.trits import look, trit_metrics
from tclip_jax.parallel.agreement import Agreement, Failure, gather_json, together
from tclip_jax.parallel.mesh import describe_run, make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.checkpoints import Checkpoints, check_checkpoint
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.runs.record import in_words, read_metrics
from tclip_jax.runs.steps import saved_steps, whole_steps
from tclip_jax.training.build import Architecture, Build, check_batch
from tclip_jax.training.evaluation import FAILED, Evaluation, EvaluationError
from tclip_jax.training.input import Batches, open_feed
from tclip_jax.training.metrics import Journal, Telemetry, check_telemetry
from tclip_jax.training.optimizer import learning_rate_schedule
from tclip_jax.training.preemption import Notices, Stopped
from tclip_jax.training.start import Resume, start_params
from tclip_jax.training.state import TrainState
from tclip_jax.training.teacher_cache import open_cache
from tclip_jax.training.timing import Phases, Speed, Trace
from tclip_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Model:
    """Trains to `config.steps`, going on from the newest whole checkpoint in `workdir` if there is one.

    Leaves in `workdir`: config.json (resolved), history.jsonl (what was changed when it was resumed), checkpoints/,
    metrics.jsonl, tensorboard/, bad_samples.jsonl where there were any, and of several processes heartbeats/. What
    metrics.jsonl says of a step is there before the step's checkpoint is. A start that is refused writes nothing.

    Returns:
      The trained model, its weights latent.

    Raises:
      ValueError: an impossible configuration, a workdir that holds another model's run, a checkpoint that cannot be
        written, `max_skipped_steps` steps in a row that changed nothing, too many bad samples, or evaluations that fail
        again and again. Of several processes all raise what one did.
      Stopped: it was asked to stop, on any process, and is saved.
    """
    run, workdir = run_config(config), epath.Path(workdir)
    if run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", run.compile_cache)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.slices)
    check_batch(run, mesh)
    for line in describe_run(mesh, run.data.batch_size):
        _logger.info("%s", line)
    with together():
        source = open_source(run.data.source, run.data.split)
        cache = open_cache(run, source) if run.data.teacher_cache else None
    data, bad = open_feed(run, source, workdir, mesh, cache)
    teacher, teacher_params, taught_by = _load_teacher(run, cache, mesh)
    build = Build(run, mesh, teacher or cache)
    with together():
        evaluations = [Evaluation(each) for each in (run.eval, *run.evals) if each.source]
        check_telemetry(run.wandb_project)
    whole = whole_steps(workdir / "checkpoints")
    first = max(whole, default=0)
    start, began_with = start_params(run, mesh) if not first else (None, None)
    trained_on = {"source": run.data.source, "split": run.data.split, **described(source)}
    resume = Resume(config, workdir, first, data=trained_on, teacher=taught_by, init=began_with)
    with jax.set_mesh(mesh):
        if first:
            changed = in_words(resume.changed, ("loss", "optimizer", "teacher", "data.teacher_cache"))
            check_checkpoint(workdir / "checkpoints", first, build.state_shapes.trees(), data.seek, changed)

    phases = Phases()
    with (
        jax.set_mesh(mesh),
        contextlib.closing(data),
        Notices() as notices,
        Checkpoints(workdir / "checkpoints", run.checkpoint, whole) as checkpoints,
        Watchdog(workdir, phases, run.stall_minutes, leave=run.stall_exit) as watchdog,
        Trace(workdir, run.profile_steps) as trace,
    ):
        with phases.during("compile"):
            restored = checkpoints.restore(build.state_shapes.trees())
            state = TrainState.of_trees(restored) if restored else build.init_state(start)
            del start  # the state has a copy
            step_function = build.jitted_step(state)
        schedule = learning_rate_schedule(run.optimizer, run.steps)
        wandb = {"wandb_project": run.wandb_project, "config": config.to_dict()}
        with together():
            telemetry = Telemetry(workdir, first_step=first, steps=run.steps, title=workdir.name, **wandb)
        with telemetry:
            with together():
                resume.begin()
            speed = Speed(run.data.batch_size, _flops(build), mesh.devices.flat, run.log_every)
            journal = Journal(
                telemetry,
                checkpoints,
                speed,
                steps=run.steps,
                max_skipped=run.max_skipped_steps,
                bad=bad,
                batch_size=run.data.batch_size,
            )
            agreement, failure = Agreement(mesh, 3), telemetry.failure
            written = _written_before(workdir, first, checkpoints, bad, run.data.batch_size)
            # A run may have ended between a checkpoint and the evaluation of its step.
            due = [each for each in evaluations if each.is_due(first, run.steps) and not each.is_among(written)]
            _evaluate(due if first else [], journal, first, build, state, phases)
            batch = None
            for step in range(first + 1, run.steps + 1):
                watchdog.step(step)
                with failure.kept():
                    trace.before(step)
                with phases.during("data"):
                    batch = _next_batch(data, batch, failure)
                looks = run.rules and run.telemetry_every and step % run.telemetry_every == 0
                before = look(state.params["clip"], run.rules) if looks else {}
                with phases.during("step" if step > first + 1 else "compile"):
                    state, metrics = step_function(state, batch, teacher_params)
                stop, late, failed = agreement.ask((notices.code, checkpoints.is_late(), failure.error is not None))
                if failed:
                    failure.raise_everywhere()
                journal.flush()
                with failure.kept():
                    trace.after(step, metrics)
                rates = speed.metrics(phases.take())
                journal.add(step, metrics | {"learning_rate": schedule(step - 1)} | rates)
                if looks:
                    telemetry.write_trits(step, trit_metrics(before, state.params["clip"], run.rules))
                due = [each for each in evaluations if each.is_due(step, run.steps)]
                if (
                    checkpoints.is_due(step, late=bool(late))
                    or (due and run.checkpoint.keep_best)
                    or stop
                    or step == run.steps
                ):
                    journal.finish() if step == run.steps else journal.flush()
                    telemetry.sync()
                    failure.raise_everywhere()
                    with phases.during("checkpoint"):
                        checkpoints.save(step, state.trees(), data.position)
                if stop:
                    checkpoints.wait()
                    if jax.process_index() == 0:
                        _logger.warning("asked to stop: step %d is saved, and the same command goes on from it", step)
                    raise Stopped(stop)
                if due:
                    journal.flush()
                    _evaluate(due, journal, step, build, state, phases)
                if run.checkpoint.keep_best and (step == run.steps or len(due) == len(evaluations) > 0):
                    journal.check_measured(run.checkpoint.best_metric)
            failure.raise_everywhere()
    return Model(run.model, run.preprocess, state.params["clip"], run.rules)


def _load_teacher(
    run: RunConfig, cache: TeacherCache | None, mesh: Mesh
) -> tuple[Architecture | None, Any, dict[str, Any] | None]:
    """The teacher that runs in the step, its parameters over `mesh`, of which no other copy is kept, and its origin."""
    if not run.teacher:
        return None, None, cache.origin if cache else None
    teacher, origin = load_known(run.teacher, mesh)
    params = jax.device_put(teacher.params, tree_shardings(teacher.params, mesh))
    return Architecture(teacher.config, teacher.preprocess, teacher.rules), params, origin


def _next_batch(data: Batches, before: Any, failure: Failure) -> Any:
    """The next batch; of several processes, on one that fails, the batch before.

    With it the process takes part in a step that is not saved: all processes raise the failure first. Without a batch
    before they raise it here.
    """
    if before is None:
        with together():
            return next(data)
    try:
        return next(data)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure.keep(error)
        return before


def _evaluate(
    evaluations: Sequence[Evaluation], journal: Journal, step: int, build: Build, state: TrainState, phases: Phases
) -> None:
    """Of the weights and of their average, which is made ternary again and whose metrics end in `_of_average`."""
    run = build.run
    for each in evaluations:
        with phases.during("evaluate"):
            try:
                metrics = each(Model(run.model, run.preprocess, state.params["clip"], run.rules), build.mesh)
                if state.average is not None and FAILED not in metrics:
                    of_average = each(Model(run.model, run.preprocess, state.average, run.rules), build.mesh)
                    metrics |= {f"{name}_of_average": value for name, value in of_average.items()}
            except EvaluationError as error:
                journal.write(step, error.metrics)
                raise
        journal.write(step, metrics)


def _flops(build: Build) -> int:
    """Of the model, per pair."""
    teacher = build.teacher
    return train_flops(
        build.run.model, None if teacher is None or isinstance(teacher, TeacherCache) else teacher.config
    )


def _written_before(
    workdir: epath.Path, step: int, checkpoints: Checkpoints, bad: BadSamples, batch_size: int
) -> list[str]:
    """Names of what metrics.jsonl has of `step`.

    Tells `checkpoints` what it has of the steps that are saved, and `bad` of the bad samples of all steps.
    """
    lines: list[dict[str, Any]] = []
    counts: dict[str, float] = dict.fromkeys(FAULTS[1:], 0.0)
    steps = 0
    with together():
        if jax.process_index() == 0:
            saved = saved_steps(workdir / "checkpoints")
            for line in read_metrics(workdir):
                lines += [line] if line["step"] in saved and "trits" not in line else []
                steps += "loss" in line
                for kind in FAULTS[1:]:
                    counts[kind] += line.get(f"bad/{kind}", 0)
    lines, counts, steps = gather_json([lines, counts, steps])[0]
    bad.resume(counts, steps * batch_size)
    for line in lines:
        checkpoints.score(line["step"], line)
    return [name for line in lines if line["step"] == step for name in line]
