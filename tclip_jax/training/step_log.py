"""The log of a training run: a line every few steps, and a line for each evaluation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from tclip_jax.data.bad_samples import format_counts
from tclip_jax.log import with_metrics
from tclip_jax.training.timing import Phase, Throughput

AVERAGE = "_of_average"  # suffix of the metrics of the moving average

_MAX_METRICS = 6  # in the line of an evaluation
_PHASES = ("data", "checkpoint", "evaluate", "compile")  # the rest of the time is that of the steps

_logger = logging.getLogger(__name__)


class StepLog:
    """Logs the steps and evaluations of a run.

    Args:
      throughput: computes the rates of an interval.
      steps: number of steps of the whole run.
      every: steps between lines; 0 for none.
    """

    def __init__(self, throughput: Throughput, steps: int, every: int) -> None:
        self._throughput, self._steps, self._every = throughput, steps, every
        self._width = len(str(steps))
        self._seconds = dict.fromkeys(get_args(Phase), 0.0)  # since the last line
        self._bad = Counter[str]()  # by kind, since the last line
        self._since = 0  # steps since the last line
        self._total_seconds, self._total_steps = 0.0, 0  # since the start, without compilation

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count a step, and log a line if one is due: every few steps, and for the last step.

        The record has the metrics of the step, with the rates and the bad samples since the last line, and
        `eta_seconds`.
        """
        self._since, self._total_steps = self._since + 1, self._total_steps + 1
        for name, value in metrics.items():
            group, _, part = name.partition("/")
            if group == "seconds":
                self._seconds[part] += value
                self._total_seconds += value * (part != "compile")
            elif group == "bad":
                self._bad[part] += int(value)
        if not self._every or (step % self._every and step != self._steps):
            return
        rates = self._throughput.rates(self._seconds, self._since)
        eta = (self._steps - step) * self._total_seconds / self._total_steps
        bad = {f"bad/{kind}": count for kind, count in self._bad.items() if count}
        bad["bad_samples"] = self._bad.total()
        known = {name: value for name, value in metrics.items() if not name.startswith("bad")}
        self._log(step, self._step_line(metrics, rates, eta), known | rates | bad | {"eta_seconds": round(eta)})
        self._seconds, self._bad, self._since = dict.fromkeys(self._seconds, 0.0), Counter(), 0

    def evaluation(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Log the metrics of an evaluation after a step."""
        self._log(step, [*evaluation_parts(metrics), f"({seconds:.1f} s)"], metrics)

    def _log(self, step: int, parts: list[str], metrics: Mapping[str, Any]) -> None:
        line = "  ".join([f"step {step:>{self._width}}/{self._steps}", *parts])
        _logger.info("%s", line, extra=with_metrics({"step": step, **metrics}))

    def _step_line(self, metrics: Mapping[str, float], rates: Mapping[str, float], eta: float) -> list[str]:
        terms = {name.removeprefix("loss/"): value for name, value in metrics.items() if name.startswith("loss/")}
        # A single term of weight 1 is the loss.
        shown = list(terms.values()) != [metrics["loss"]] and terms
        loss = f"loss {metrics['loss']:7.4f}"
        loss += f" ({', '.join(f'{name} {value:.4f}' for name, value in terms.items())})" if shown else ""
        parts = [loss, f"{rates['images_per_second']:7,.1f} images/s"]
        parts += [f"MFU {rates['mfu']:5.1%}"] if "mfu" in rates else []
        parts.append(f"ETA {duration(eta)}")
        total = max(sum(self._seconds.values()), 1e-9)
        shares = {phase: self._seconds[phase] / total for phase in _PHASES}
        parts.append(", ".join(f"{phase} {share:.0%}" for phase, share in shares.items() if share >= 0.005))
        parts.append(f"bad: {format_counts(self._bad)}" if self._bad.total() else "")
        return [part for part in parts if part]


def evaluation_parts(metrics: Mapping[str, float]) -> list[str]:
    """Return the metrics of an evaluation as text: losses as numbers, fractions in per cent.

    A suite is shown by its averages, a validation loss without its terms. A metric of the moving average follows that
    of the weights in parentheses.
    """
    logged = ("evaluations_failed", "images_failed")  # with their reasons
    names = [name for name in metrics if not name.startswith(logged) and not name.endswith(AVERAGE)]
    names = [name for name in names if name.count("/") < 2] or names

    def formatted(name: str) -> str:
        is_loss = name.removesuffix(AVERAGE).endswith("/loss")
        return f"{metrics[name]:.4f}" if is_loss else f"{metrics[name]:.2%}"

    parts = []
    for name in names[:_MAX_METRICS]:
        average = f" (average {formatted(name + AVERAGE)})" if name + AVERAGE in metrics else ""
        parts.append(f"{name} {formatted(name)}{average}")
    return [*parts, f"and {len(names) - _MAX_METRICS} more in metrics.jsonl"] if names[_MAX_METRICS:] else parts


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss, or as days and hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours < 48 else f"{hours // 24} d {hours % 24} h"
