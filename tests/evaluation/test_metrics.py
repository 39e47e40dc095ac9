"""Metrics against scikit-learn and plain definitions."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from tclip_jax.evaluation.metrics import (
    average_precision,
    hit_rate,
    mean_average_precision,
    mean_per_class_recall,
    top_k,
    top_k_accuracy,
)


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40))
def test_classification_equals_scikit_learn(seed: int, classes: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = (
        rng.normal(size=(rows, classes)),
        np.concatenate([[0, classes - 1], rng.integers(0, classes, rows)]),
    )
    logits = np.concatenate([logits, rng.normal(size=(2, classes))])
    names = np.arange(classes)
    for k in range(1, classes):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=names) if classes > 2 else None
        assert expected is None or top_k_accuracy(logits, labels, k) == pytest.approx(expected)
    predictions = np.where(np.isin(logits.argmax(1), labels), logits.argmax(1), labels[0])
    expected = balanced_accuracy_score(labels, predictions)
    assert mean_per_class_recall(predictions, labels) == pytest.approx(expected)


@hypothesis.given(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=8))
def test_the_lower_class_of_equal_logits_comes_first(rows: list[list[int]]) -> None:
    expected = [sorted(range(4), key=lambda c, row=row: (-row[c], c)) for row in rows]  # type: ignore[misc]
    logits = np.array(rows, np.float32)
    for k in range(1, 7):
        assert top_k(logits, k).tolist() == [each[:k] for each in expected]
    assert logits.tolist() == rows, "the argument is not modified"


def test_average_precision_is_the_mean_precision_at_the_positives() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.2, 0.5], [0.7, 0.3, 0.5], [0.6, 0.4, 0.5]])
    targets = np.array([[1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 1]])
    expected = [(1 + 2 / 3) / 2, (1 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2]
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=1e-15)
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(expected))
    assert average_precision(scores, targets * [0, 1, 1])[0] == 0, "0 without positives"


def test_metrics_of_no_rows_are_nan() -> None:
    empty, labels = np.empty((0, 3)), np.empty(0, int)
    values = [
        top_k_accuracy(empty, labels, 1),
        hit_rate(empty, labels),
        mean_per_class_recall(labels, labels),
        mean_average_precision(empty, empty),
    ]
    assert np.isnan(values).all()
