"""A run under way: what the loop uses, checked before anything is written and opened in order."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.sources import FAULTS, described, open_source
from tclip_jax.inference.load import load_known
from tclip_jax.inference.model import Model
from tclip_jax.models.flops import train_flops
from tclip_jax.models.trits import trit_metrics, trit_snapshot
from tclip_jax.parallel.agreement import Agreement, FirstError, allgather_json, together
from tclip_jax.parallel.mesh import describe_run, make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.checkpoints import Checkpoints, check_checkpoint
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.runs.record import in_words, read_metrics
from tclip_jax.runs.steps import saved_steps, whole_steps
from tclip_jax.training.build import Architecture, Build, check_batch
from tclip_jax.training.evaluation import FAILED, Evaluation, EvaluationError
from tclip_jax.training.input import ResumableIterator, open_input
from tclip_jax.training.metrics import MetricsLogger, Telemetry, check_telemetry
from tclip_jax.training.optimizer import learning_rate_schedule
from tclip_jax.training.preemption import PreemptionHandler, Stopped
from tclip_jax.training.start import Resume, start_params
from tclip_jax.training.state import TrainState
from tclip_jax.training.teacher_cache import open_cache
from tclip_jax.training.timing import StepTimer, Throughput, Trace
from tclip_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """A run of which everything is open and checked, and nothing is written.

    Attributes:
      whole: steps with a whole checkpoint; the newest is resumed.
      start: parameters to start from, in place of random ones; dropped once the state has a copy.
    """

    run: RunConfig
    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh
    data: ResumableIterator
    bad: BadSamples
    build: Build
    teacher_params: Any
    evaluations: list[Evaluation]
    whole: list[int]
    start: Any
    resume: Resume

    @property
    def first_step(self) -> int:
        """The step that is resumed, 0 for none."""
        return max(self.whole, default=0)


def prepare(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Prepared:
    """Checks a run whole and opens what it needs; a collective. Raises as `loop.train`."""
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
    data, bad = open_input(run, source, workdir, mesh, cache)
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
    if first:
        changed = in_words(resume.changed, ("loss", "optimizer", "teacher", "data.teacher_cache"))
        with jax.set_mesh(mesh):
            check_checkpoint(workdir / "checkpoints", first, build.state_shapes.trees(), data.seek, changed)
    return Prepared(run, config, workdir, mesh, data, bad, build, teacher_params, evaluations, whole, start, resume)


class Session:
    """What the loop does at a step besides the step; a context manager. Every process calls the same methods.

    Attributes:
      failure: the first error of this process outside the step, which all processes raise together.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._ready, self._run, self._timer = prepared, prepared.run, StepTimer()
        self._schedule = learning_rate_schedule(self._run.optimizer, self._run.steps)
        self._before: Any = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        ready, run, enter = self._ready, self._run, self._stack.enter_context
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            enter(jax.set_mesh(ready.mesh))
            enter(contextlib.closing(ready.data))
            self._preemption = enter(PreemptionHandler())
            self._checkpoints = enter(Checkpoints(ready.workdir / "checkpoints", run.checkpoint, ready.whole))
            self._watchdog = enter(Watchdog(ready.workdir, self._timer, run.stall_minutes, leave=run.stall_exit))
            self._trace = enter(Trace(ready.workdir, run.profile_steps))
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, at)

    def restore(self) -> TrainState:
        """The newest checkpoint's state or a fresh one, after which metrics are written and missed evaluations made."""
        ready, run = self._ready, self._run
        with self._timer.during("compile"):
            restored = self._checkpoints.restore(ready.build.state_shapes.trees())
            state = TrainState.of_trees(restored) if restored else ready.build.init_state(ready.start)
            ready.start = None
            self._step_function = ready.build.jitted_step(state)
        wandb = {"wandb_project": run.wandb_project, "config": ready.config.to_dict()}
        title = ready.workdir.name
        with together():
            telemetry = Telemetry(ready.workdir, first_step=ready.first_step, steps=run.steps, title=title, **wandb)
        self._telemetry = self._stack.enter_context(telemetry)
        self.failure = telemetry.failure
        with together():
            ready.resume.begin()
        throughput = Throughput(run.data.batch_size, _flops(ready.build), ready.mesh.devices.flat, run.log_every)
        self._metrics = MetricsLogger(
            telemetry,
            self._checkpoints,
            throughput,
            steps=run.steps,
            max_skipped=run.max_skipped_steps,
            bad=ready.bad,
            batch_size=run.data.batch_size,
        )
        self._throughput, self._agreement = throughput, Agreement(ready.mesh, 3)
        written = _written_before(ready.workdir, ready.first_step, self._checkpoints, ready.bad, run.data.batch_size)
        # A run may have ended between a checkpoint and the evaluation of its step.
        missed = [each for each in self.due(ready.first_step) if ready.first_step and not each.is_among(written)]
        _evaluate(missed, self._metrics, ready.first_step, ready.build, state, self._timer)
        return state

    def next_batch(self, step: int, before: Any) -> Any:
        """The batch of a step; `before` is that of the step before, None at first."""
        self._watchdog.step(step)
        with self.failure.captured():
            self._trace.before(step)
        with self._timer.during("data"):
            return _next_batch(self._ready.data, before, self.failure)

    def train_step(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Dispatches `training.step`: the next state and the metrics, which are not waited for."""
        if self._looks(step):
            self._before = trit_snapshot(state.params["clip"], self._run.rules)
        with self._timer.during("step" if step > self._ready.first_step + 1 else "compile"):
            return self._step_function(state, batch, self._ready.teacher_params)

    def agree(self) -> tuple[int, bool]:
        """The code with which all processes stop, 0 for none, and whether a checkpoint is late; raises what failed."""
        asked = (self._preemption.code, self._checkpoints.is_late(), self.failure.error is not None)
        stop, late, failed = self._agreement.all_hosts_max(asked)
        if failed:
            self.failure.raise_everywhere()
        return stop, bool(late)

    def record(self, step: int, metrics: Any, state: TrainState) -> None:
        """Writes the metrics of the step before, and takes those of this one."""
        self._metrics.flush()
        with self.failure.captured():
            self._trace.after(step, metrics)
        rates = self._throughput.metrics(self._timer.take())
        self._metrics.add(step, metrics | {"learning_rate": self._schedule(step - 1)} | rates)
        if self._looks(step):
            self._telemetry.write_trits(step, trit_metrics(self._before, state.params["clip"], self._run.rules))
            self._before = {}

    def due(self, step: int) -> list[Evaluation]:
        """The evaluations of a step."""
        return [each for each in self._ready.evaluations if each.is_due(step, self._run.steps)]

    def is_save_due(self, step: int, *, late: bool) -> bool:
        """Whether the state after a step is saved: by its number, by time, as the last, or as one that is evaluated."""
        evaluated = self._run.checkpoint.keep_best and self.due(step)
        return self._checkpoints.is_due(step, late=late) or bool(evaluated) or step == self._run.steps

    def save(self, step: int, state: TrainState) -> None:
        """Saves in the background, when all metrics up to the step are written."""
        self._metrics.finish() if step == self._run.steps else self._metrics.flush()
        self._telemetry.sync()
        self.failure.raise_everywhere()
        with self._timer.during("checkpoint"):
            self._checkpoints.save(step, state.trees(), self._ready.data.position)

    def stop(self, step: int, code: int) -> NoReturn:
        """Raises Stopped when the step that was saved is whole."""
        self._checkpoints.wait()
        if jax.process_index() == 0:
            _logger.warning("asked to stop: step %d is saved, and the same command resumes it", step)
        raise Stopped(code)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Runs the evaluations that are due."""
        due, ready = self.due(step), self._ready
        if due:
            self._metrics.flush()
            _evaluate(due, self._metrics, step, ready.build, state, self._timer)
        everything = len(due) == len(ready.evaluations) > 0
        if self._run.checkpoint.keep_best and (step == self._run.steps or everything):
            self._metrics.check_measured(self._run.checkpoint.best_metric)

    def _looks(self, step: int) -> bool:
        every = self._run.telemetry_every
        return bool(self._run.rules) and every > 0 and step % every == 0


def _load_teacher(
    run: RunConfig, cache: TeacherCache | None, mesh: Mesh
) -> tuple[Architecture | None, Any, dict[str, Any] | None]:
    """The teacher that runs in the step, its parameters over `mesh`, of which no other copy is kept, and its origin."""
    if not run.teacher:
        return None, None, cache.origin if cache else None
    teacher, origin = load_known(run.teacher, mesh)
    params = jax.device_put(teacher.params, tree_shardings(teacher.params, mesh))
    return Architecture(teacher.config, teacher.preprocess, teacher.rules), params, origin


def _next_batch(data: ResumableIterator, before: Any, failure: FirstError) -> Any:
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
        failure.store(error)
        return before


def _evaluate(
    evaluations: Sequence[Evaluation],
    logger: MetricsLogger,
    step: int,
    build: Build,
    state: TrainState,
    timer: StepTimer,
) -> None:
    """Of the weights and of their average, which is made ternary again and whose metrics end in `_of_average`."""
    run = build.run
    for each in evaluations:
        with timer.during("evaluate"):
            try:
                metrics = each(Model(run.model, run.preprocess, state.params["clip"], run.rules), build.mesh)
                if state.average is not None and FAILED not in metrics:
                    of_average = each(Model(run.model, run.preprocess, state.average, run.rules), build.mesh)
                    metrics |= {f"{name}_of_average": value for name, value in of_average.items()}
            except EvaluationError as error:
                logger.write(step, error.metrics)
                raise
        logger.write(step, metrics)


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
    lines, counts, steps = allgather_json([lines, counts, steps])[0]
    bad.resume(counts, steps * batch_size)
    for line in lines:
        checkpoints.score(line["step"], line)
    return [name for line in lines if line["step"] == step for name in line]
