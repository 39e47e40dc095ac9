"""Paired bootstrap intervals of the difference between two models on the same images.

Not `scipy.stats.bootstrap`, which draws image by image: one multinomial draw over the distinct rows does the same for
any number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]
# (weights (B, U), rows (U, F)) -> a figure for each of the B weightings: how often each row was drawn.
Metric = Callable[[Numbers, Numbers], npt.NDArray[np.float64]]

_CHUNK = 1 << 22  # weights held at a time, 32 MiB


def mean_of(column: int, count: int | None = None) -> Metric:
    """The mean of a column over the images drawn, or its sum over that of another column, which counts."""

    def metric(weights: Numbers, rows: Numbers) -> npt.NDArray[np.float64]:
        return weights @ rows[:, column] / (weights.sum(1) if count is None else weights @ rows[:, count])

    return metric


def per_class_mean_of(column: int, label: int) -> Metric:
    """The mean, over the classes (a column of labels) that were drawn, of the mean of a column within the class."""

    def metric(weights: Numbers, rows: Numbers) -> npt.NDArray[np.float64]:
        classes, index = np.unique(rows[:, label], return_inverse=True)
        member = (index[:, None] == np.arange(len(classes))).astype(np.float64)
        drawn, right = weights @ member, (weights * rows[:, column]) @ member
        return np.sum(right / np.maximum(drawn, 1), axis=1) / np.count_nonzero(drawn, axis=1)

    return metric


def bootstrap_differences(
    rows: Numbers, metric_a: Metric, metric_b: Metric, *, resamples: int, seed: int | Sequence[int]
) -> npt.NDArray[np.float64]:
    """B − A of a metric for every resample (resamples,): as many images as there are, drawn with replacement.

    Pairs stay together: an image is drawn for both models or for neither. Images whose rows are equal cannot be told
    apart by a metric, so how often each distinct row is drawn is one multinomial draw, whatever the number of images:
    the same distribution as that of drawing images.

    Args:
      rows: what the metrics need of each image, for both models (N, F).
      seed: of the draws; another for every data set, or their draws would rise and fall together.

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
    """The same of mean average precision, which no distinct rows shorten.

    Args:
      scores_a, scores_b: (N, C) of both models.
      targets: 1 where an image has a class, else 0 (N, C).
    """
    count = len(targets)
    rng = np.random.default_rng(seed)
    differences = []
    for size in _chunks(resamples, count):
        weights = rng.multinomial(count, np.full(count, 1 / count), size)
        differences.append(_weighted_map(scores_b, targets, weights) - _weighted_map(scores_a, targets, weights))
    return np.concatenate(differences)


def interval(differences: npt.NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval: what the middle `level` of all resamples span."""
    tail = (1 - level) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return float(low), float(high)


def _weighted_map(scores: Numbers, targets: Numbers, weights: Numbers) -> npt.NDArray[np.float64]:
    """Mean average precision (B,) where image i occurs weights[:, i] times: each copy of a positive is a positive."""
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
