"""The session of a run: everything that the training loop uses, checked before anything is written."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import jax
import ml_collections
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.sources import FAULTS, described, open_source
from tclip_jax.data.tokenizer import TextTokenizer
from tclip_jax.inference.load import Architecture, load_known
from tclip_jax.models.flops import train_flops
from tclip_jax.models.trits import trit_metrics, trit_snapshot
from tclip_jax.parallel.agreement import Agreement, FirstError, allgather_json, together
from tclip_jax.parallel.mesh import describe_run, device_record, make_mesh
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.checkpoints import Checkpoints, check_checkpoint
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.runs.record import in_words, read_metrics
from tclip_jax.runs.steps import saved_steps, whole_steps
from tclip_jax.runs.tokenizer import keep_tokenizer
from tclip_jax.training.build import Build, check_batch, teacher_params
from tclip_jax.training.evaluation import FAILED, Evaluation, EvaluationError
from tclip_jax.training.input import ResumableIterator, draw_sample, open_input
from tclip_jax.training.metrics import MetricsLogger, Telemetry, check_telemetry
from tclip_jax.training.optimizer import learning_rate_schedule
from tclip_jax.training.preemption import PreemptionHandler, Stopped
from tclip_jax.training.start import Resume, start_params
from tclip_jax.training.state import TrainState
from tclip_jax.training.step_log import AVERAGE, StepLog
from tclip_jax.training.teacher_cache import open_cache
from tclip_jax.training.timing import Compilations, StepTimer, Throughput, Trace, device_memory
from tclip_jax.training.tokenizer import check_teacher_tokenizer, run_tokenizer
from tclip_jax.training.watchdog import Watchdog

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Prepared:
    """A run whose parts are all open and checked, and that has written nothing.

    Attributes:
      run: the checked configuration.
      config: the configuration as the caller passed it, for the records.
      workdir: workdir of the run.
      mesh: the devices.
      data: batches as global arrays.
      bad: the record of bad samples.
      build: student, optimizer and step.
      teacher_params: sharded parameters of a teacher that runs in the step, or None.
      evaluations: with their data open.
      whole: the steps with a whole checkpoint; the run resumes from the newest.
      start: initial parameters, or None for random ones; dropped when the state has copied them.
      resume: the comparison with earlier starts.
    """

    run: RunConfig
    config: ml_collections.ConfigDict
    workdir: epath.Path
    mesh: Mesh
    data: ResumableIterator
    tokenizer: TextTokenizer
    bad: BadSamples
    build: Build
    teacher_params: Any
    evaluations: list[Evaluation]
    whole: list[int]
    start: Any
    resume: Resume

    @property
    def first_step(self) -> int:
        """The step to resume; 0 for a new run."""
        return max(self.whole, default=0)


def prepare(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Prepared:
    """Check a run and open its data, teacher and evaluations. A collective. Raises the errors of `loop.train`."""
    run, workdir = run_config(config), epath.Path(workdir)
    if run.compile_cache:
        jax.config.update("jax_compilation_cache_dir", run.compile_cache)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor, run.mesh.slices)
    check_batch(run, mesh)
    process, *lines = describe_run(mesh, run.data.batch_size)
    for line in [process, *lines] if jax.process_index() == 0 else [process]:
        _logger.info("%s", line)
    if run.optimizer.mu_dtype != "float32":
        _logger.info("the first moment accumulates in %s (config.optimizer.mu_dtype)", run.optimizer.mu_dtype)
    with together():
        source = open_source(run.data.source, run.data.split)
        tokenizer = run_tokenizer(run, workdir)
        cache = open_cache(run, source, tokenizer) if run.data.teacher_cache else None
    data, bad = open_input(run, source, workdir, mesh, cache, tokenizer)
    teacher, teacher_params, teacher_origin = _load_teacher(run, cache, mesh, tokenizer)
    build = Build(run, mesh, teacher or cache)
    with together():
        evaluations = [Evaluation(each, run, tokenizer) for each in (run.eval, *run.evals) if each.source]
        check_telemetry(run.wandb_project)
    whole = whole_steps(workdir / "checkpoints")
    first = max(whole, default=0)
    start, init_origin = start_params(run, mesh) if not first else (None, None)
    data_origin = {"source": run.data.source, "split": run.data.split, **described(source)}
    if isinstance(tokenizer, FileTokenizer):
        data_origin["tokenizer"] = tokenizer.digest
    resume = Resume(
        config,
        workdir,
        first,
        data=data_origin,
        teacher=teacher_origin,
        init=init_origin,
        plugins=run.plugins,
        devices=device_record(mesh),
    )
    if run.plugins:  # an error in one is found by a sample and by tracing the step, before anything is written
        with together():
            draw_sample(run, source, tokenizer)
        with jax.set_mesh(mesh):
            step = build.jitted_step(build.state_shapes)
            jax.eval_shape(step, build.state_shapes, build.batch_shapes, build.teacher_shapes)
    if first:
        changed = in_words(resume.changed, ("loss", "optimizer", "teacher", "data.teacher_cache"))
        with jax.set_mesh(mesh):
            check_checkpoint(workdir / "checkpoints", first, build.state_shapes.trees(), data.seek, changed)
    return Prepared(
        run, config, workdir, mesh, data, tokenizer, bad, build, teacher_params, evaluations, whole, start, resume
    )


class Session:
    """What the training loop does around each step; a context manager. Every process calls the same methods.

    Attributes:
      failure: the first error of this process outside the step, which all processes raise together.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self._run, self._timer = prepared, prepared.run, StepTimer()
        self._schedule = learning_rate_schedule(self._run.optimizer, self._run.steps)
        self._snapshot: Any = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        prepared, run, enter = self._prepared, self._run, self._stack.enter_context
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            enter(jax.set_mesh(prepared.mesh))
            enter(contextlib.closing(prepared.data))
            self._preemption = enter(PreemptionHandler())
            self._checkpoints = enter(Checkpoints(prepared.workdir / "checkpoints", run.checkpoint, prepared.whole))
            self._watchdog = enter(Watchdog(prepared.workdir, self._timer, run.stall_minutes, leave=run.stall_exit))
            self._trace = enter(Trace(prepared.workdir, run.profile_steps))
            self._compilations = enter(Compilations())
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, at)

    def restore(self) -> TrainState:
        """Open the metrics, record the start, run missed evaluations, and return the state.

        The state is that of the newest checkpoint, or the initial state.
        """
        prepared, run = self._prepared, self._run
        with self._timer.during("compile"):
            restored = self._checkpoints.restore(prepared.build.state_shapes.trees())
            state = TrainState.of_trees(restored) if restored else prepared.build.init_state(prepared.start)
            prepared.start = None
            self._step_function = prepared.build.jitted_step(state)
        workdir, first = prepared.workdir, prepared.first_step
        wandb = {"wandb_project": run.wandb_project, "config": prepared.config.to_dict()}
        with together():
            telemetry = Telemetry(workdir, first_step=first, steps=run.steps, title=workdir.name, **wandb)
        self._telemetry = self._stack.enter_context(telemetry)
        self.failure = telemetry.failure
        with together():
            if isinstance(prepared.tokenizer, FileTokenizer) and jax.process_index() == 0:
                keep_tokenizer(workdir, prepared.tokenizer)
            prepared.resume.begin()
        throughput = Throughput(run.data.batch_size, _flops(prepared.build), prepared.mesh.devices.flat)
        self._metrics = MetricsLogger(
            telemetry,
            self._checkpoints,
            StepLog(throughput, run.steps, run.log_every),
            max_skipped=run.max_skipped_steps,
            bad=prepared.bad,
            batch_size=run.data.batch_size,
        )
        self._throughput, self._agreement = throughput, Agreement(prepared.mesh, 3)
        written = _read_written(workdir, first, self._checkpoints, prepared.bad, run.data.batch_size)
        # A run may have ended between a checkpoint and the evaluation of its step.
        missed = [each for each in self.due(first) if first and not each.has_metrics(written)]
        self._evaluate(missed, first, state)
        return state

    def next_batch(self, step: int, previous: Any) -> Any:
        """Return the batch of a step; `previous` is the batch of the step before, None at first."""
        self._watchdog.step(step)
        with self.failure.captured():
            self._trace.before(step)
        with self._timer.during("data"):
            return _next_batch(self._prepared.data, previous, self.failure)

    def train_step(self, step: int, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Dispatch the jitted step; return the next state and the metrics without waiting for them."""
        if self._is_snapshot_due(step):
            self._snapshot = trit_snapshot(state.params["clip"], self._run.rules)
        with self._timer.during("step" if step > self._prepared.first_step + 1 else "compile"):
            return self._step_function(state, batch, self._prepared.teacher_params)

    def agree(self) -> tuple[int, bool]:
        """Return the exit code with which all processes stop (0: none does), and whether a time-based save is due.

        Raises:
          Exception: a process has failed; its error is raised everywhere.
        """
        with self.failure.captured():
            self._checkpoints.check()
        requests = (self._preemption.code, self._checkpoints.is_late(), self.failure.error is not None)
        stop, late, failed = self._agreement.all_hosts_max(requests)
        if failed:
            self.failure.raise_everywhere()
        return stop, bool(late)

    def record(self, step: int, metrics: Any, state: TrainState) -> None:
        """Write the metrics of the previous step, and store those of this step until they are computed."""
        self._metrics.flush()
        with self.failure.captured():
            self._trace.after(step, metrics)
        rates = self._throughput.metrics(self._timer.take()) | self._compilations.metrics()
        if step == self._run.steps or (self._run.log_every and step % self._run.log_every == 0):
            rates |= device_memory(self._prepared.mesh.local_devices)
        self._metrics.add(step, metrics | {"learning_rate": self._schedule(step - 1)} | rates)
        if self._is_snapshot_due(step):
            self._telemetry.write_trits(step, trit_metrics(self._snapshot, state.params["clip"], self._run.rules))
            self._snapshot = {}

    def due(self, step: int) -> list[Evaluation]:
        """Return the evaluations that are due after a step."""
        return [each for each in self._prepared.evaluations if each.is_due(step, self._run.steps)]

    def is_save_due(self, step: int, *, late: bool) -> bool:
        """Whether to save the state after a step: by step number, by time, at the end, or for `keep_best`."""
        evaluated = self._run.checkpoint.keep_best and self.due(step)
        return self._checkpoints.is_due(step, late=late) or bool(evaluated) or step == self._run.steps

    def save(self, step: int, state: TrainState) -> None:
        """Write all metrics up to a step, then start to save its state in the background."""
        self._metrics.finish() if step == self._run.steps else self._metrics.flush()
        self._telemetry.sync()
        self.failure.raise_everywhere()
        with self._timer.during("checkpoint"):
            self._checkpoints.save(step, state.trees(), self._prepared.data.position)

    def stop(self, step: int, code: int) -> NoReturn:
        """Wait until the saved step is whole, then raise `Stopped`."""
        self._checkpoints.wait()
        if jax.process_index() == 0:
            _logger.warning("stopping after a signal: step %d is saved; run the same command to resume", step)
        raise Stopped(code)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Run the evaluations that are due after a step."""
        due, prepared = self.due(step), self._prepared
        if due:
            self._metrics.flush()
            self._evaluate(due, step, state)
        all_done = len(due) == len(prepared.evaluations) > 0
        if self._run.checkpoint.keep_best and (step == self._run.steps or all_done):
            self._metrics.check_measured(self._run.checkpoint.best_metric)

    def _evaluate(self, evaluations: Sequence[Evaluation], step: int, state: TrainState) -> None:
        """Evaluate the weights and their moving average, whose metrics have the suffix `_of_average`."""
        prepared = self._prepared
        for each in evaluations:
            started = time.monotonic()
            with self._timer.during("evaluate"):
                try:
                    metrics = each(state.params, prepared.build, prepared.teacher_params)
                    if state.average is not None and FAILED not in metrics:
                        averaged = state.params | {"clip": state.average}
                        average = each(averaged, prepared.build, prepared.teacher_params)
                        metrics |= {f"{name}{AVERAGE}": value for name, value in average.items()}
                except EvaluationError as error:
                    self._metrics.write(step, error.metrics)
                    raise
            self._metrics.write_evaluation(step, metrics, time.monotonic() - started)

    def _is_snapshot_due(self, step: int) -> bool:
        every = self._run.telemetry_every
        return bool(self._run.rules) and every > 0 and step % every == 0


def _load_teacher(
    run: RunConfig, cache: TeacherCache | None, mesh: Mesh, tokenizer: TextTokenizer
) -> tuple[Architecture | None, Any, dict[str, Any] | None]:
    """Return the teacher that runs in the step, its parameters over `mesh`, and its origin or that of the cache."""
    if not run.teacher:
        return None, None, cache.origin if cache else None
    teacher, origin = load_known(run.teacher, mesh)
    check_teacher_tokenizer(run.teacher, teacher.config.text, teacher.tokenizer, tokenizer)
    params = teacher_params(teacher.params, teacher.rules, run)
    params = jax.device_put(params, tree_shardings(params, mesh))
    return Architecture(teacher.config, teacher.preprocess, teacher.rules), params, origin


def _next_batch(data: ResumableIterator, previous: Any, failure: FirstError) -> Any:
    """Return the next batch, or the previous batch if the data of one of several processes fail.

    That process then takes part in one more step, which is not saved, before all processes raise its error. If there is
    no previous batch, all processes raise the error here.
    """
    if previous is None:
        with together():
            return next(data)
    try:
        return next(data)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure.store(error)
        return previous


def _flops(build: Build) -> int:
    """Return the model FLOPs per image-text pair."""
    teacher = build.teacher
    return train_flops(
        build.run.model, None if teacher is None or isinstance(teacher, TeacherCache) else teacher.config
    )


def _read_written(
    workdir: epath.Path, step: int, checkpoints: Checkpoints, bad: BadSamples, batch_size: int
) -> list[str]:
    """Read metrics.jsonl to restore the scores of `checkpoints` and the counts of `bad`.

    Returns:
      The names of the metrics of `step`.
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
