"""The metrics of every step: read when the next is under way, written, judged and shown."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.parallel.failures import raised_by_all
from tclip_jax.runs.checkpoints import Checkpoints
from tclip_jax.training.speed import Speed
from tclip_jax.training.telemetry import Telemetry

_logger = logging.getLogger(__name__)


class Journal:
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
        speed: Speed,
        *,
        steps: int,
        max_skipped: int,
        bad: BadSamples | None = None,
        batch_size: int = 0,
    ) -> None:
        self._telemetry, self._checkpoints, self._speed = telemetry, checkpoints, speed
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
            line = self._speed.line(step, self._steps, values)
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
