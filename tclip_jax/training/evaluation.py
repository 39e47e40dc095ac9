"""Evaluation inside training: the evaluation of `tclip evaluate`, every n steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

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

        Without a name that is zero_shot_accuracy alone, where there is one.
        """
        encoder = Encoder(model, batch_size=self._config.batch_size, mesh=mesh)
        report = evaluate(encoder, self._tasks, model="", title=self._config.name)
        if not self._config.name and report.averages:
            return {"zero_shot_accuracy": report.averages["acc1"]}
        prefix = self._config.name or "eval"
        metrics = {f"{prefix}/{name}": value for name, value in report.averages.items() if self._config.suite}
        for dataset, result in report.results.items():
            path = f"{prefix}/{dataset}" if self._config.suite else prefix
            metrics |= {f"{path}/{name}": value for name, value in result.metrics.items()}
        return {name: value for name, value in metrics.items() if not math.isnan(value)}
