"""Evaluation during training: the tasks and metrics of `tclip evaluate`, or the validation loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.tokenizer import TextTokenizer
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import Report, evaluate
from tclip_jax.evaluation.tasks import opened, source_task, suite_tasks
from tclip_jax.inference.model import Model
from tclip_jax.runs.config import EvalConfig, RunConfig
from tclip_jax.training.build import Build
from tclip_jax.training.validation import ValidationLoss

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


class Measured(NamedTuple):
    """The result of an evaluation.

    Attributes:
      metrics: by name.
      excluded: number of images that do not count, by data set and reason.
      errors: one line for each data set without a result.
    """

    metrics: dict[str, float]
    excluded: Mapping[str, Mapping[str, int]]
    errors: Mapping[str, str]


Measure = Callable[[Any, Build, Any], Measured]


class Evaluation:
    """One evaluation of the configuration. The constructor opens its data, and raises an error if that fails."""

    def __init__(self, config: EvalConfig, run: RunConfig, tokenizer: TextTokenizer | None = None) -> None:
        self._config = config
        self._failures, self._succeeded = 0, False
        self._excluded: Mapping[str, Mapping[str, int]] = {}
        self._measure = _loss(config, run, tokenizer) if config.kind == "loss" else _tasks(config, tokenizer)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to evaluate after `step` of `steps` steps."""
        return step % self._config.every == 0 or step == steps

    def has_metrics(self, names: Iterable[str]) -> bool:
        """Whether one of these metric names belongs to this evaluation."""
        prefix, unnamed = f"{_prefix(self._config)}/", not self._config.name and self._config.kind == "tasks"
        return any(name.startswith(prefix) or (name == "zero_shot_accuracy" and unnamed) for name in names)

    def __call__(self, params: Any, build: Build, teacher_params: Any) -> dict[str, float]:
        """Return the metrics of parameters, evaluated in float32.

        Args:
          params: the student's parameters: `clip`, the model, and `heads`, which only the validation loss uses.
          build: the run on its mesh.
          teacher_params: the teacher's parameters if it runs in the step, otherwise None.

        Returns:
          `<name>/<metric>`, for a suite `<name>/<data set>/<metric>`; without a name, only zero_shot_accuracy if the
          evaluation has it, and `validation/<metric>` for the validation loss. `evaluations_failed` counts the data
          sets without a result and `images_failed` the images that are excluded, if there are any.

        Raises:
          EvaluationError: no evaluation so far had a result, or `MAX_FAILURES` evaluations in a row had failures.
        """
        metrics, excluded, errors = self._measure(params, build, teacher_params)
        self._succeeded |= bool(metrics)
        suffix = f"/{self._config.name}" if self._config.name else ""
        if count := sum(sum(counts.values()) for counts in excluded.values()):
            metrics[f"images_failed{suffix}"] = float(count)
        if errors:
            metrics |= {FAILED: float(len(errors)), f"{FAILED}{suffix}": float(len(errors))}
            self._count_failure(errors, metrics)
        else:
            self._failures = 0
        if jax.process_index() == 0 and excluded != self._excluded:
            for name, counts in excluded.items():
                reasons = ", ".join(f"{count:,} x {reason}" for reason, count in counts.items())
                _logger.warning("evaluation of %s: excluded images: %s", name, reasons)
        self._excluded = excluded
        return metrics

    def _count_failure(self, errors: Mapping[str, str], metrics: dict[str, float]) -> None:
        """Log an evaluation with failures; raise EvaluationError for the first, or the last of a row."""
        self._failures += 1
        why = "; ".join(f"{name}: {reason}" for name, reason in errors.items())
        key = f"config.evals {self._config.name}" if self._config.name else "config.eval"
        if not self._succeeded or self._failures >= MAX_FAILURES:
            times = f"{self._failures} times in a row" if self._succeeded else "at the first evaluation"
            raise EvaluationError(f"{key}: no result {times}: {why}", metrics)
        if jax.process_index() == 0:
            _logger.error("%s: no result: %s", key, why)


def _prefix(config: EvalConfig) -> str:
    return config.name or ("validation" if config.kind == "loss" else "eval")


def _loss(config: EvalConfig, run: RunConfig, tokenizer: TextTokenizer | None) -> Measure:
    """Return the measurement of the validation loss."""
    loss, prefix = ValidationLoss(config, run, tokenizer), _prefix(config)

    def measure(params: Any, build: Build, teacher_params: Any) -> Measured:
        try:
            metrics, excluded = loss(params, build, teacher_params)
        except ValueError as error:
            return Measured({}, {}, {config.source: str(error)})
        named = {f"{prefix}/{name}": value for name, value in metrics.items()}
        return Measured(named, {config.source: excluded} if excluded else {}, {})

    return measure


def _tasks(config: EvalConfig, tokenizer: TextTokenizer | None) -> Measure:
    """Return the measurement of a suite or a source by the tasks of `tclip evaluate`."""
    tasks = opened(
        suite_tasks(config.source, config.suite)
        if config.suite
        else [source_task(config.source, config.split, config.templates)]
    )

    stored = tokenizer if isinstance(tokenizer, FileTokenizer) else None

    def measure(params: Any, build: Build, _: Any) -> Measured:
        model = Model(build.run.model, build.run.preprocess, params["clip"], build.run.rules, stored)
        encoder = Encoder(model, batch_size=config.batch_size, mesh=build.mesh)
        report = evaluate(encoder, tasks, model="", title=config.name)
        return Measured(_measured(config, report), report.partial, report.errors)

    return measure


def _measured(config: EvalConfig, report: Report) -> dict[str, float]:
    if not config.name and report.averages:
        return {"zero_shot_accuracy": report.averages["acc1"]}
    prefix = _prefix(config)
    metrics = {f"{prefix}/{name}": value for name, value in report.averages.items() if config.suite}
    for dataset, result in report.results.items():
        path = f"{prefix}/{dataset}" if config.suite else prefix
        metrics |= {f"{path}/{name}": value for name, value in result.metrics.items()}
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
