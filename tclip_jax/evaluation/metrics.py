"""Metrics of classification: functions on arrays, with CLIP_benchmark's definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


def top_k(logits: Floats, k: int) -> npt.NDArray[np.int32]:
    """The min(k, C) most probable classes of each row of (N, C), best first; of equal logits the lower class first."""
    rest = np.array(logits)
    best = np.empty((len(rest), min(k, rest.shape[1])), np.int32)
    for column in range(best.shape[1]):
        best[:, column] = rest.argmax(axis=1)
        np.put_along_axis(rest, best[:, column, None], -np.inf, axis=1)
    return best


def top_k_accuracy(logits: Floats, labels: Integers, k: int) -> float:
    """Share of rows of `logits` (N, C) whose label (N,) is among their k largest, 0–1; NaN without rows."""
    return hit_rate(top_k(logits, k), labels)


def hit_rate(candidates: Integers, labels: Integers) -> float:
    """Share of rows of `candidates` (N, k) that hold their label (N,), 0–1; NaN without rows."""
    return float(np.mean((candidates == labels[:, None]).any(axis=1))) if len(labels) else float("nan")


def mean_per_class_recall(predictions: Integers, labels: Integers) -> float:
    """The mean over the classes that occur in `labels` of the share of their rows predicted right, 0–1; NaN if empty.

    Args:
      predictions: classes (N,).
      labels: true classes (N,), from 0.
    """
    if not len(labels):
        return float("nan")
    rows = np.bincount(labels)
    right = np.bincount(labels[predictions == labels], minlength=len(rows))
    return float(np.mean(right[rows > 0] / rows[rows > 0]))


def classification_metrics(top: Integers, labels: Integers, classes: int) -> dict[str, float]:
    """acc1, acc5 (NaN of fewer than five classes) and mean_per_class_recall.

    Args:
      top: the min(5, classes) most probable classes of each row, best first (N, k), as of `top_k`.
      labels: true classes (N,), from 0.
    """
    return {
        "acc1": hit_rate(top[:, :1], labels),
        "acc5": hit_rate(top, labels) if classes >= 5 else float("nan"),
        "mean_per_class_recall": mean_per_class_recall(top[:, 0], labels),
    }


def average_precision(scores: Floats, targets: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Of each class (C,) the mean of the precision at each of its positives; 0 for a class that has none.

    Rows are ranked by falling score, of equal ones the earlier first. Not scikit-learn's average_precision_score, which
    takes equal scores together: CLIP_benchmark ranks each.

    Args:
      scores: (N, C).
      targets: 1 (or True) where a row has a class, else 0: (N, C).
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    truth = np.take_along_axis(np.asarray(targets, np.float64), order, axis=0)
    precision = np.cumsum(truth, axis=0) / np.arange(1, len(truth) + 1)[:, None]
    return (precision * truth).sum(axis=0) / np.maximum(truth.sum(axis=0), 1)


def mean_average_precision(scores: Floats, targets: npt.NDArray[Any]) -> float:
    """The mean over all classes of `average_precision`, 0–1; not the 11-point rule of VOC. NaN without rows."""
    return float(np.mean(average_precision(scores, targets))) if len(scores) else float("nan")
