"""Evaluation inside training: the evaluation of `tclip evaluate`, every n steps."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from tclip_jax.artifacts.model import Model
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import opened, source_task, suite_tasks
from tclip_jax.training.config import EvalConfig


class Evaluation:
    """An entry of the configuration with its data open; raises what opening it raises."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._tasks = opened(
            suite_tasks(config.source, config.suite)
            if config.suite
            else [source_task(config.source, config.split, config.templates)]
        )

    def is_due(self, step: int) -> bool:
        """Whether it is to be run after `step` steps."""
        return step % self._config.every == 0

    def __call__(self, model: Model, mesh: Mesh) -> dict[str, float]:
        """The metrics of the model, in float32: `<name>/<data set>/<metric>`, or without a name zero_shot_accuracy."""
        encoder = Encoder(model, batch_size=self._config.batch_size, mesh=mesh)
        report = evaluate(encoder, self._tasks, model="", title=self._config.name)
        if not self._config.name and report.averages:
            return {"zero_shot_accuracy": report.averages["acc1"]}
        prefix = self._config.name or "eval"
        metrics = {f"{prefix}/{name}": value for name, value in report.averages.items() if len(self._tasks) > 1}
        for dataset, result in report.results.items():
            metrics |= {f"{prefix}/{dataset}/{name}": value for name, value in result.metrics.items()}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}
