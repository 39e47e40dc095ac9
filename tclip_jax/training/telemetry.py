"""Where metrics go: a bar, metrics.jsonl, TensorBoard and, if wanted, Weights & Biases; from process 0 only."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import numpy.typing as npt
import tqdm
from etils import epath

from tclip_jax.models.trits import HISTOGRAM_EDGES
from tclip_jax.parallel.failures import Failure
from tclip_jax.storage import is_local, write_atomic
from tclip_jax.training.tensorboard import EventFile


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
        self.failure = Failure()
        self._first = jax.process_index() == 0
        if not self._first:
            return
        self._wandb = _open_wandb(workdir, wandb_project, title, config) if wandb_project else None
        self._lines = [json.dumps(line) for line in read_metrics(workdir) if line["step"] <= first_step]
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
        with self.failure.kept():
            self._flush()
        with self.failure.kept():
            self._events.close()
        with self.failure.kept():
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
        with self.failure.kept():
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
        with self.failure.kept():
            self._append({"step": step, "trits": rounded})
            for path, each in values.items():
                for name in ("zeros", "flips", "scale", "drift", "saturated"):
                    self._events.scalar(f"{name}/{path}", float(each[name].mean()), step)
                self._write_histogram(f"latent/{path}", each["histogram"].mean(axis=0), step)

    def sync(self) -> None:
        """Waits until all that was written is in metrics.jsonl, and on a local disk."""
        if not self._active:
            return
        with self.failure.kept():
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
        line = json.dumps(_without_nan(values), allow_nan=False)
        self._lines.append(line)
        if is_local(self._path):
            with self._path.open("a") as file:
                file.write(line + "\n")
        elif len(self._lines) % 1000 == 0:
            self._flush()

    def _flush(self) -> None:
        write_atomic(self._path, "".join(line + "\n" for line in self._lines))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_telemetry(wandb_project: str) -> None:
    """Raises ValueError where Weights & Biases is asked for and not installed, before a run has begun."""
    if wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"config.wandb_project is {wandb_project!r}: it needs wandb (pip install wandb)")


def _open_wandb(workdir: epath.PathLike, project: str, title: str, config: Mapping[str, Any] | None) -> Any:
    """A run of Weights & Biases that is gone on with from the same workdir."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ValueError(f"config.wandb_project is {project!r}: it needs wandb (pip install wandb)") from None
    same = hashlib.sha256(os.fspath(epath.Path(workdir).resolve()).encode()).hexdigest()[:12]
    return wandb.init(project=project, name=title, id=same, resume="allow", config=dict(config or {}))


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]
