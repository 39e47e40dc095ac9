"""Paired bootstrap intervals of the difference between two models on the same images.

`scipy.stats.bootstrap` draws every image of every resample. Here one multinomial draw over the distinct rows gives the
same distribution at a cost that does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
# (weights (B, U), rows (U, F)) -> the metric (B,) of B resamples; a weight is how often the resample has the row.
Metric = Callable[[Numbers, Numbers], npt.NDArray[np.float64]]

_CHUNK = 1 << 22  # weights in memory at a time: 32 MiB


def mean_of(column: int, count: int | None = None) -> Metric:
    """Return the metric: the mean of a column, or its sum divided by the sum of the column `count`."""

    def metric(weights: Numbers, rows: Numbers) -> npt.NDArray[np.float64]:
        return weights @ rows[:, column] / (weights.sum(1) if count is None else weights @ rows[:, count])

    return metric


def per_class_mean_of(column: int, label: int) -> Metric:
    """Return the metric: the mean of a column per class in the column `label`, averaged over the drawn classes."""

    def metric(weights: Numbers, rows: Numbers) -> npt.NDArray[np.float64]:
        classes, index = np.unique(rows[:, label], return_inverse=True)
        member = (index[:, None] == np.arange(len(classes))).astype(np.float64)
        drawn, total = weights @ member, (weights * rows[:, column]) @ member
        return np.sum(total / np.maximum(drawn, 1), axis=1) / np.count_nonzero(drawn, axis=1)

    return metric


def bootstrap_differences(
    rows: Numbers, metric_a: Metric, metric_b: Metric, *, resamples: int, seed: int | Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the difference B − A of a metric in each resample (resamples,).

    A resample has N images drawn with replacement, the same for both models. Images with equal rows are
    interchangeable, so a multinomial draw over the distinct rows has the same distribution as drawing images.

    Args:
      rows: the values of each image that the metrics read, for both models (N, F).
      metric_a, metric_b: the metric of either model.
      resamples: number of resamples.
      seed: seed of the draws. Use a different one per data set, so that their differences are independent.

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 6.
    """
    distinct, counts = np.unique(np.asarray(rows, np.float64), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    differences = []
    for size in _chunks(resamples, len(distinct)):
        weights = rng.multinomial(len(rows), counts / len(rows), size).astype(np.float64)
        differences.append(metric_b(weights, distinct) - metric_a(weights, distinct))
    return np.concatenate(differences)


def bootstrap_map_differences(
    scores_a: Numbers, scores_b: Numbers, targets: Numbers, *, resamples: int, seed: int | Sequence[int]
) -> npt.NDArray[np.float64]:
    """Return the `bootstrap_differences` of mean average precision, which needs the scores of every image.

    Args:
      scores_a, scores_b: scores of either model (N, C).
      targets: 1 where an image has a class, else 0 (N, C).
      resamples: number of resamples.
      seed: seed of the draws.
    """
    count = len(targets)
    rng = np.random.default_rng(seed)
    differences = []
    for size in _chunks(resamples, count):
        weights = rng.multinomial(count, np.full(count, 1 / count), size)
        differences.append(_weighted_map(scores_b, targets, weights) - _weighted_map(scores_a, targets, weights))
    return np.concatenate(differences)


def interval(differences: npt.NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval: the range of the middle `level` of all resamples."""
    tail = (1 - level) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)


def _weighted_map(scores: Numbers, targets: Numbers, weights: Numbers) -> npt.NDArray[np.float64]:
    """Return the mean average precision (B,) of resamples in which image i occurs weights[:, i] times."""
    total = np.zeros(len(weights))
    for row, truth in zip(scores.T, np.asarray(targets).T, strict=True):
        order = np.argsort(-row, kind="stable")
        positive = np.flatnonzero(truth[order])
        drawn = weights[:, order]
        copies = drawn[:, positive]
        above = np.cumsum(drawn, axis=1)[:, positive] - copies
        hits = np.cumsum(copies, axis=1) - copies
        precision = np.zeros(len(weights))
        for copy in range(1, int(copies.max(initial=0)) + 1):
            precision += np.sum((copies >= copy) * ((hits + copy) / (above + copy)), axis=1)
        total += precision / np.maximum(copies.sum(axis=1), 1)
    return total / targets.shape[1]


def _chunks(resamples: int, width: int) -> list[int]:
    size = max(_CHUNK // width, 1)
    return [min(size, resamples - start) for start in range(0, resamples, size)]
