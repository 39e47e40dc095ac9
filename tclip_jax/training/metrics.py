"""The metrics of every step on process 0: progress bar, metrics.jsonl, TensorBoard and optional Weights & Biases."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import numpy.typing as npt
import tqdm
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import directory_check
from tensorboardX.summary import histogram_raw, scalar

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.models.trits import HISTOGRAM_EDGES
from tclip_jax.parallel.agreement import FirstError, raised_by_all
from tclip_jax.runs.checkpoints import Checkpoints
from tclip_jax.runs.record import read_metrics
from tclip_jax.storage import dump_json, is_local, write_atomic
from tclip_jax.training.step_log import StepLog

_FLUSH_SECONDS = 120.0  # each flush rewrites the whole file on an object store

_logger = logging.getLogger(__name__)


class EventFile:
    """A TensorBoard file that hides events of older files in its folder at `first_step` and later."""

    def __init__(self, folder: epath.PathLike, first_step: int) -> None:
        directory_check(os.fspath(folder))
        self._file = EventsWriter(os.path.join(os.fspath(folder), "events"))
        self._flushed = time.monotonic()
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a finite number."""
        self._add(Event(summary=scalar(name, value)), step)

    def histogram(self, name: str, step: int, **parts: Any) -> None:
        """Add a histogram by its `min`, `max`, `num`, `sum`, `sum_squares`, `bucket_limits` and `bucket_counts`."""
        self._add(Event(summary=histogram_raw(name, **parts)), step)

    def flush(self) -> None:
        """Write all added events to the file."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._file.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()


class Telemetry:
    """A context manager that writes the metrics of a run; on other processes than 0 it does nothing.

    A write error, such as a full disk, is stored in `failure`; nothing more is written. The caller raises the error
    on all processes; otherwise the exit of the context raises it.

    When a run is resumed, repeated steps are removed from metrics.jsonl and hidden in TensorBoard, so that each step
    appears once. In metrics.jsonl, numbers that are not finite are null.

    Args:
      workdir: workdir of the run.
      first_step: the step that is resumed, 0 for a new run.
      steps: number of steps of the whole run.
      title: title of the progress bar and of the Weights & Biases run.
      wandb_project: "" for none.
      config: the configuration, for Weights & Biases.

    Attributes:
      failure: the first error of writing.

    Raises:
      ValueError: `wandb_project` is set and wandb is not installed.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        first_step: int,
        steps: int,
        title: str,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self.failure = FirstError()
        self._first = jax.process_index() == 0
        if not self._first:
            return
        self._wandb = _open_wandb(workdir, wandb_project, title, config) if wandb_project else None
        self._lines = [dump_json(line, indent=None) for line in read_metrics(workdir) if line["step"] <= first_step]
        self._flush()
        self._events = EventFile(epath.Path(workdir) / "tensorboard", first_step + 1)
        self._bar = tqdm.tqdm(
            total=steps,
            initial=first_step,
            desc=title,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._first:
            return
        with self.failure.captured():
            self._flush()
        with self.failure.captured():
            self._events.close()
        with self.failure.captured():
            self._bar.close()
            if self._wandb:
                self._wandb.finish(exit_code=int(error is not None))
        if error is None and self.failure.error:
            raise self.failure.error

    @property
    def _active(self) -> bool:
        return self._first and self.failure.error is None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the scalars of `step`, without zeros of `bad/…`, and advance the progress bar."""
        if not self._active:
            return
        scalars = {name: float(value) for name, value in metrics.items()}
        scalars = {name: value for name, value in scalars.items() if value or not name.startswith("bad/")}
        with self.failure.captured():
            self._append({"step": step} | scalars)
            for name, value in scalars.items():
                if math.isfinite(value):
                    self._events.scalar(name, value, step)
            if self._wandb:
                self._wandb.log(scalars, step=step)
        self._bar.update(step - self._bar.n)
        if "loss" in scalars:
            self._bar.set_postfix_str(f"loss {scalars['loss']:.3f}", refresh=False)

    def write_trits(self, step: int, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Write `trit_metrics` of `step`: a line {"step", "trits"}, and means over layers to TensorBoard."""
        if not self._active:
            return
        values = {path: {name: np.asarray(value) for name, value in each.items()} for path, each in metrics.items()}
        rounded = {
            path: {name: np.round(np.float64(value), 6).tolist() for name, value in each.items()}
            for path, each in values.items()
        }
        with self.failure.captured():
            self._append({"step": step, "trits": rounded})
            for path, each in values.items():
                for name in ("zeros", "flips", "scale", "drift", "saturated"):
                    self._events.scalar(f"{name}/{path}", float(each[name].mean()), step)
                self._write_histogram(f"latent/{path}", each["histogram"].mean(axis=0), step)

    def sync(self) -> None:
        """Write all lines to metrics.jsonl, and flush a local file to disk (fsync)."""
        if not self._active:
            return
        with self.failure.captured():
            self._events.flush()
            if is_local(self._path):
                with self._path.open("a") as file:
                    os.fsync(file.fileno())
            else:
                self._flush()

    def _write_histogram(self, name: str, shares: npt.NDArray[np.floating], step: int) -> None:
        """Add a histogram of |w| / s; its last bin, which is unbounded, is drawn as wide as the others."""
        width = HISTOGRAM_EDGES[1]
        limits = [*HISTOGRAM_EDGES[1:], HISTOGRAM_EDGES[-1] + width]
        centres = np.array(limits) - width / 2
        self._events.histogram(
            name,
            step,
            min=0.0,
            max=limits[-1],
            num=1.0,
            sum=float(shares @ centres),
            sum_squares=float(shares @ centres**2),
            bucket_limits=limits,
            bucket_counts=shares.tolist(),
        )

    def _append(self, values: dict[str, Any]) -> None:
        """Append a line to a local file; an object store gets the whole file at every 1,000th line and in `sync`."""
        line = dump_json(values, indent=None)
        self._lines.append(line)
        if is_local(self._path):
            with self._path.open("a") as file:
                file.write(line)
        elif len(self._lines) % 1000 == 0:
            self._flush()

    def _flush(self) -> None:
        write_atomic(self._path, "".join(self._lines))


def check_telemetry(wandb_project: str) -> None:
    """Raise ValueError if `wandb_project` is set and wandb is not installed."""
    if wandb_project:
        _import_wandb(wandb_project)


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError(f"config.wandb_project is {project!r}: it needs wandb (pip install wandb)") from None


def _open_wandb(workdir: epath.PathLike, project: str, title: str, config: Mapping[str, Any] | None) -> Any:
    """Start the Weights & Biases run of a workdir, or resume it."""
    run_id = hashlib.sha256(os.fspath(epath.Path(workdir).resolve()).encode()).hexdigest()[:12]
    wandb = _import_wandb(project)
    return wandb.init(project=project, name=title, id=run_id, resume="allow", config=dict(config or {}))


class MetricsLogger:
    """Writes the metrics of a step when those of the next step arrive, so that the devices never wait for the host.

    Args:
      telemetry: writes the metrics.
      checkpoints: receives the scores that decide which steps are best.
      log: logs the steps and evaluations.
      max_skipped: skipped steps in a row that stop the run. A step is skipped if its loss or gradient is not finite, or
        its batch has no usable sample.
      bad: checks the fraction of bad samples.
      batch_size: samples per step.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        checkpoints: Checkpoints,
        log: StepLog,
        *,
        max_skipped: int,
        bad: BadSamples | None = None,
        batch_size: int = 0,
    ) -> None:
        self._telemetry, self._checkpoints, self._log, self._max_skipped = telemetry, checkpoints, log, max_skipped
        self._bad, self._batch_size = bad, batch_size
        self._skipped, self._pending = 0, dict[int, Mapping[str, Any]]()
        self._names: set[str] = set()

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the pending metrics, and store those of `step`, which the devices may still compute.

        Raises:
          ValueError: too many steps in a row were skipped, or too many samples are bad.
        """
        self.flush()
        self._pending = {step: metrics}

    def flush(self) -> None:
        """Wait for the pending metrics and write them; raise the errors of `add`."""
        pending, self._pending = self._pending, {}
        for step, metrics in pending.items():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.write(step, values)
            if jax.process_index() == 0:
                self._log.step(step, values)
            with raised_by_all():
                if self._bad:
                    self._bad.check(values, self._batch_size)
                self._check_skipped(step, values)

    def finish(self) -> None:
        """Flush after the last step of a run, and check the bad samples of the whole run, even a short one."""
        self.flush()
        with raised_by_all():
            if self._bad:
                self._bad.finish()

    def write_evaluation(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Write and log the metrics of an evaluation, which took `seconds`."""
        self.write(step, metrics)
        if jax.process_index() == 0:
            self._log.evaluation(step, metrics, seconds)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write metrics whose values are known at once."""
        self._telemetry.write(step, metrics)
        self._checkpoints.score(step, metrics)
        self._names |= metrics.keys()

    def check_measured(self, metric: str) -> None:
        """Raise ValueError if no step had `metric`, by which the best step is chosen."""
        if metric in self._names:
            return
        near = difflib.get_close_matches(metric, self._names, 3, 0.3)
        raise ValueError(
            f"config.checkpoint.best_metric: {metric!r} is not measured, so keep_best has no effect: choose a name in"
            f" metrics.jsonl, such as {', '.join(near) or 'loss'}"
        )

    def _check_skipped(self, step: int, metrics: Mapping[str, float]) -> None:
        if not metrics["skipped_steps"]:
            self._skipped = 0
            return
        self._skipped += 1
        reason = " and ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))
        advice = "lower config.optimizer.learning_rate or set clip_norm, and run the same command"
        if not reason:
            reason, advice = "its batch has no usable sample", "see bad_samples.jsonl for the reasons"
        if self._skipped >= self._max_skipped:
            raise ValueError(
                f"step {step}: {reason}; this is the last of {self._skipped} skipped steps in a row"
                f" (config.max_skipped_steps): {advice}"
            )
        if jax.process_index() == 0:
            _logger.warning("step %d: %s; the step is skipped", step, reason)
