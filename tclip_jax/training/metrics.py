"""The metrics of every step: a bar, metrics.jsonl, TensorBoard and, if wanted, Weights & Biases; on process 0 alone."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
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
from tclip_jax.training.timing import Throughput

_FLUSH_SECONDS = 120.0  # an object store gets the whole file at each flush


class EventFile:
    """A file of scalars and histograms; what older files of the folder say of `first_step` and later is hidden."""

    def __init__(self, folder: epath.PathLike, first_step: int) -> None:
        directory_check(os.fspath(folder))
        self._file = EventsWriter(os.path.join(os.fspath(folder), "events"))
        self._flushed = time.monotonic()
        self._add(Event(session_log=SessionLog(status=SessionLog.START)), first_step)

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a finite number."""
        self._add(Event(summary=scalar(name, value)), step)

    def histogram(self, name: str, step: int, **parts: Any) -> None:
        """Adds a histogram by its `min`, `max`, `num`, `sum`, `sum_squares`, `bucket_limits` and `bucket_counts`."""
        self._add(Event(summary=histogram_raw(name, **parts)), step)

    def flush(self) -> None:
        """Waits until all that was added is in the file."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _add(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._file.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()


class Telemetry:
    """A context manager that shows and writes scalars by step.

    It runs on process 0 alone, so what fails is not raised there but kept in `failure`, and nothing more is written:
    the caller raises it on all processes. Who does not gets it on leaving.

    On resuming, what was written of steps that will be done again is dropped from metrics.jsonl and hidden in
    TensorBoard, so that each step is there once. What is not a finite number is null in metrics.jsonl.

    Attributes:
      failure: the first error, a disk that is full or a store that is away.

    Raises:
      ValueError: `wandb_project` is given and wandb is not installed.
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
        """Records the scalars of `step` and moves the bar there; of `bad/…` those that are not 0."""
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
        """Records `trit_metrics` of `step`: a line {"step", "trits"}, and means over layers in TensorBoard."""
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
        """Waits until all that was written is in metrics.jsonl, and on a local disk."""
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
        """Of |w| / s; the last bin, which has no end, is drawn as wide as the others."""
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
        """A local file grows line by line; an object store gets the whole when synced and at every thousandth line."""
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
    """Raises ValueError where Weights & Biases is asked for and not installed, before a run has begun."""
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"config.wandb_project is {wandb_project!r}: it needs wandb (pip install wandb)")


def _open_wandb(workdir: epath.PathLike, project: str, title: str, config: Mapping[str, Any] | None) -> Any:
    """A run of Weights & Biases, resumed from the same workdir."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError(f"config.wandb_project is {project!r}: it needs wandb (pip install wandb)") from None
    same = hashlib.sha256(os.fspath(epath.Path(workdir).resolve()).encode()).hexdigest()[:12]
    return wandb.init(project=project, name=title, id=same, resume="allow", config=dict(config or {}))


_logger = logging.getLogger(__name__)


class MetricsLogger:
    """Writes the metrics of a step when it is given those of the next, so that no device is kept waiting.

    Args:
      steps: of the whole run.
      bad: judges the bad samples of each step.
      batch_size: samples of each step.
      max_skipped: steps in a row that change nothing, after which the run is given up: their loss or gradient is not
        finite, or their batch has no usable sample.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        checkpoints: Checkpoints,
        throughput: Throughput,
        *,
        steps: int,
        max_skipped: int,
        bad: BadSamples | None = None,
        batch_size: int = 0,
    ) -> None:
        self._telemetry, self._checkpoints, self._throughput = telemetry, checkpoints, throughput
        self._steps, self._max_skipped = steps, max_skipped
        self._bad, self._batch_size = bad, batch_size
        self._skipped, self._pending = 0, dict[int, Mapping[str, Any]]()
        self._names: set[str] = set()

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes what `step` will have measured, and writes what is pending.

        Raises:
          ValueError: too many steps in a row changed nothing, or too many samples were bad.
        """
        self.flush()
        self._pending = {step: metrics}

    def flush(self) -> None:
        """Waits for what is pending, and writes it; raises as `add`."""
        pending, self._pending = self._pending, {}
        for step, metrics in pending.items():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.write(step, values)
            line = self._throughput.line(step, self._steps, values)
            if line and jax.process_index() == 0:
                _logger.info("%s", line)
            with raised_by_all():
                if self._bad:
                    self._bad.check(values, self._batch_size)
                self._judge(step, values)

    def finish(self) -> None:
        """As `flush`, after the last step of a run, whose bad samples are judged as a whole."""
        self.flush()
        with raised_by_all():
            if self._bad:
                self._bad.finish()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes at once what is known already."""
        self._telemetry.write(step, metrics)
        self._checkpoints.score(step, metrics)
        self._names |= metrics.keys()

    def check_measured(self, metric: str) -> None:
        """Raises ValueError if `metric` was in none of the metrics, so that no step can be the best by it."""
        if metric in self._names:
            return
        near = difflib.get_close_matches(metric, self._names, 3, 0.3)
        raise ValueError(
            f"config.checkpoint.best_metric: {metric!r} is not measured, so keep_best keeps nothing: choose a name of"
            f" metrics.jsonl, such as {', '.join(near) or 'loss'}"
        )

    def _judge(self, step: int, metrics: Mapping[str, float]) -> None:
        if not metrics["skipped_steps"]:
            self._skipped = 0
            return
        self._skipped += 1
        wrong = " and ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))
        instead = "lower config.optimizer.learning_rate or set clip_norm, and run the same command"
        if not wrong:
            wrong, instead = "its batch has no usable sample", "see bad_samples.jsonl for the reasons"
        if self._skipped >= self._max_skipped:
            raise ValueError(
                f"step {step}: {wrong}; this is the last of {self._skipped} steps in a row that changed nothing"
                f" (config.max_skipped_steps): {instead}"
            )
        if jax.process_index() == 0:
            _logger.warning("step %d: %s; it changes nothing", step, wrong)
