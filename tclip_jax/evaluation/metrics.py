"""Classification metrics on NumPy arrays, with the definitions of CLIP_benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]


def top_k(logits: Floats, k: int) -> npt.NDArray[np.int32]:
    """Return the min(k, C) classes with the largest logits of each row, best first.

    Args:
      logits: (N, C). Of equal logits, the lower class index comes first.
      k: number of classes.

    Returns:
      Class indices (N, min(k, C)).
    """
    remaining = np.array(logits)
    top = np.empty((len(remaining), min(k, remaining.shape[1])), np.int32)
    for column in range(top.shape[1]):
        top[:, column] = remaining.argmax(axis=1)
        np.put_along_axis(remaining, top[:, column, None], -np.inf, axis=1)
    return top


def top_k_accuracy(logits: Floats, labels: Integers, k: int) -> float:
    """Return the fraction of rows of `logits` (N, C) whose label (N,) is among the k largest; NaN if N is 0."""
    return hit_rate(top_k(logits, k), labels)


def hit_rate(candidates: Integers, labels: Integers) -> float:
    """Return the fraction of rows of `candidates` (N, k) that contain their label (N,); NaN if N is 0."""
    return float(np.mean((candidates == labels[:, None]).any(axis=1))) if len(labels) else float("nan")


def mean_per_class_recall(predictions: Integers, labels: Integers) -> float:
    """Return the mean recall over the classes that occur in `labels`, in [0, 1]; NaN if N is 0.

    Args:
      predictions: predicted classes (N,).
      labels: true classes (N,), from 0.
    """
    if not len(labels):
        return float("nan")
    counts = np.bincount(labels)
    correct = np.bincount(labels[predictions == labels], minlength=len(counts))
    return float(np.mean(correct[counts > 0] / counts[counts > 0]))


def classification_metrics(top: Integers, labels: Integers, classes: int) -> dict[str, float]:
    """Return acc1, acc5 and mean_per_class_recall; acc5 is NaN for fewer than five classes.

    Args:
      top: the output of `top_k` with k = 5: (N, min(5, classes)).
      labels: true classes (N,), from 0.
      classes: number of classes.
    """
    return {
        "acc1": hit_rate(top[:, :1], labels),
        "acc5": hit_rate(top, labels) if classes >= 5 else float("nan"),
        "mean_per_class_recall": mean_per_class_recall(top[:, 0], labels),
    }


def average_precision(scores: Floats, targets: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the average precision of each class: the mean precision at the ranks of its positives.

    Rows are ranked by descending score; of equal scores, the earlier row comes first. scikit-learn's
    `average_precision_score` differs: it groups equal scores, while CLIP_benchmark ranks each row.

    Args:
      scores: (N, C).
      targets: 1 or True where a row belongs to a class, else 0: (N, C).

    Returns:
      (C,); 0 for a class without positives.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(np.asarray(targets, np.float64), order, axis=0)
    precision = np.cumsum(ranked, axis=0) / np.arange(1, len(ranked) + 1)[:, None]
    return (precision * ranked).sum(axis=0) / np.maximum(ranked.sum(axis=0), 1)


def mean_average_precision(scores: Floats, targets: npt.NDArray[Any]) -> float:
    """Return the mean of `average_precision` over all classes; NaN if N is 0. This is not VOC's 11-point rule."""
    return float(np.mean(average_precision(scores, targets))) if len(scores) else float("nan")
