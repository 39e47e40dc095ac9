"""Evaluation during training, with the tasks and metrics of `tclip evaluate`."""

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
MAX_FAILURES = 3  # failed evaluations in a row that stop the run

_logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """An evaluation failed at its first call, or repeatedly.

    Attributes:
      metrics: the metrics of the data sets that did not fail, and the counts of failures.
    """

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


class Evaluation:
    """One evaluation of the configuration. The constructor opens its data, and raises an error if that fails."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._failures, self._succeeded = 0, False
        self._tasks = opened(
            suite_tasks(config.source, config.suite)
            if config.suite
            else [source_task(config.source, config.split, config.templates)]
        )

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of `steps` steps."""
        return step % self._config.every == 0 or step == steps

    def has_metrics(self, names: Iterable[str]) -> bool:
        """Whether one of these metric names belongs to this evaluation."""
        prefix = f"{self._config.name or 'eval'}/"
        return any(
            name.startswith(prefix) or (name == "zero_shot_accuracy" and not self._config.name) for name in names
        )

    def __call__(self, model: Model, mesh: Mesh) -> dict[str, float]:
        """Return the metrics of a model, evaluated in float32.

        Args:
          model: the model.
          mesh: the devices that encode.

        Returns:
          `<name>/<metric>`, for a suite `<name>/<data set>/<metric>`; without a name, only zero_shot_accuracy if the
          evaluation has it. `evaluations_failed` counts the data sets without a result and `images_failed` the images
          that are excluded, if there are any.

        Raises:
          EvaluationError: no evaluation so far had a result, or `MAX_FAILURES` evaluations in a row had failures.
        """
        encoder = Encoder(model, batch_size=self._config.batch_size, mesh=mesh)
        report = evaluate(encoder, self._tasks, model="", title=self._config.name)
        metrics = self._measured(report)
        suffix = f"/{self._config.name}" if self._config.name else ""
        if failed := sum(sum(counts.values()) for counts in report.partial.values()):
            metrics[f"images_failed{suffix}"] = float(failed)
        self._succeeded |= bool(report.results)
        if not report.errors:
            self._failures = 0
            self._warn_of_excluded(report)
            return metrics
        metrics |= {FAILED: float(len(report.errors)), f"{FAILED}{suffix}": float(len(report.errors))}
        self._failures += 1
        why = "; ".join(f"{name}: {reason}" for name, reason in report.errors.items())
        key = f"config.evals {self._config.name}" if self._config.name else "config.eval"
        if not self._succeeded or self._failures >= MAX_FAILURES:
            times = f"{self._failures} times in a row" if self._succeeded else "at the first evaluation"
            raise EvaluationError(f"{key}: no result {times}: {why}", metrics)
        if jax.process_index() == 0:
            _logger.error("%s: no result: %s", key, why)
        self._warn_of_excluded(report)
        return metrics

    def _warn_of_excluded(self, report: Report) -> None:
        if jax.process_index() == 0:
            for name, counts in report.partial.items():
                reasons = ", ".join(f"{count:,} x {reason}" for reason, count in counts.items())
                _logger.warning("evaluation of %s: excluded images: %s", name, reasons)

    def _measured(self, report: Report) -> dict[str, float]:
        if not self._config.name and report.averages:
            return {"zero_shot_accuracy": report.averages["acc1"]}
        prefix = self._config.name or "eval"
        metrics = {f"{prefix}/{name}": value for name, value in report.averages.items() if self._config.suite}
        for dataset, result in report.results.items():
            path = f"{prefix}/{dataset}" if self._config.suite else prefix
            metrics |= {f"{path}/{name}": value for name, value in result.metrics.items()}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}
