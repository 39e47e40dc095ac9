"""Evaluation inside training: the evaluation of `tclip evaluate`, every n steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import Report, evaluate
from tclip_jax.evaluation.tasks import opened, source_task, suite_tasks
from tclip_jax.inference.model import Model
from tclip_jax.runs.config import EvalConfig

FAILED = "evaluations_failed"
MAX_FAILURES = 3  # in a row, and then the run stops

_logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """An evaluation that fails again and again; has what there is of `metrics`."""

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


class Evaluation:
    """An entry of the configuration with its data open; raises what opening it raises."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._failures, self._succeeded = 0, False
        self._tasks = opened(
            suite_tasks(config.source, config.suite)
            if config.suite
            else [source_task(config.source, config.split, config.templates)]
        )

    def is_due(self, step: int, steps: int) -> bool:
        """Whether it is to be run after `step` of `steps` steps."""
        return step % self._config.every == 0 or step == steps

    def is_among(self, names: Iterable[str]) -> bool:
        """Whether metrics of these names are, some of them, what this evaluation measures."""
        prefix = f"{self._config.name or 'eval'}/"
        return any(
            name.startswith(prefix) or (name == "zero_shot_accuracy" and not self._config.name) for name in names
        )

    def __call__(self, model: Model, mesh: Mesh) -> dict[str, float]:
        """The metrics of the model, in float32, by `<name>/<metric>`, of a suite `<name>/<data set>/<metric>`.

        Without a name that is zero_shot_accuracy alone, where there is one. `evaluations_failed` counts the data sets
        that have no result, and `images_failed` the images that do not count; they are there where they are not 0.

        Raises:
          EvaluationError: there never was a result, or a data set had none for the third time in a row.
        """
        encoder = Encoder(model, batch_size=self._config.batch_size, mesh=mesh)
        report = evaluate(encoder, self._tasks, model="", title=self._config.name)
        metrics = self._measured(report)
        which = f"/{self._config.name}" if self._config.name else ""
        if failed := sum(sum(counts.values()) for counts in report.partial.values()):
            metrics[f"images_failed{which}"] = float(failed)
        self._succeeded |= bool(report.results)
        if not report.errors:
            self._failures = 0
            self._say(report)
            return metrics
        metrics |= {FAILED: float(len(report.errors)), f"{FAILED}{which}": float(len(report.errors))}
        self._failures += 1
        why = "; ".join(f"{name}: {reason}" for name, reason in report.errors.items())
        where = f"config.evals {self._config.name}" if self._config.name else "config.eval"
        if not self._succeeded or self._failures >= MAX_FAILURES:
            times = f"{self._failures} times in a row" if self._succeeded else "at the first evaluation"
            raise EvaluationError(f"{where}: no result {times}: {why}", metrics)
        if jax.process_index() == 0:
            _logger.error("%s: no result: %s", where, why)
        self._say(report)
        return metrics

    def _say(self, report: Report) -> None:
        if jax.process_index() == 0:
            for name, counts in report.partial.items():
                reasons = ", ".join(f"{count:,} x {reason}" for reason, count in counts.items())
                _logger.warning("evaluation of %s: images do not count: %s", name, reasons)

    def _measured(self, report: Report) -> dict[str, float]:
        if not self._config.name and report.averages:
            return {"zero_shot_accuracy": report.averages["acc1"]}
        prefix = self._config.name or "eval"
        metrics = {f"{prefix}/{name}": value for name, value in report.averages.items() if self._config.suite}
        for dataset, result in report.results.items():
            path = f"{prefix}/{dataset}" if self._config.suite else prefix
            metrics |= {f"{path}/{name}": value for name, value in result.metrics.items()}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}
