"""Bootstrap intervals against SciPy, and against drawing the images of each resample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.stats

from tclip_jax.evaluation import statistics
from tclip_jax.evaluation.statistics import (
    bootstrap_differences,
    bootstrap_map_differences,
    interval,
    mean_of,
    per_class_mean_of,
)

N = 300
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 6, N) ** 2 // 5  # unequal classes
RIGHT_A = RNG.random(N) < 0.6
RIGHT_B = np.where(RNG.random(N) < 0.8, RIGHT_A, RNG.random(N) < 0.8)


def draws(resamples: int = 4000) -> npt.NDArray[np.intp]:
    return np.random.default_rng(1).integers(0, N, (resamples, N))


def per_class(right: Any, labels: Any) -> float:
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def assert_same_distribution(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> None:
    """Assert that mean, standard deviation and quantiles agree within five standard errors."""
    spread = theirs.std()
    error = spread * math.sqrt(2 / min(len(ours), len(theirs)))
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    assert abs(ours.std() - spread) < 5 * error
    for end in (0.025, 0.975):
        assert abs(np.quantile(ours, end) - np.quantile(theirs, end)) < 5 * 2 * error


def test_the_multinomial_bootstrap_of_accuracy_equals_drawing_images() -> None:
    rows = np.stack([RIGHT_A, RIGHT_B], axis=1)
    ours = bootstrap_differences(rows, mean_of(0), mean_of(1), resamples=4000, seed=0)
    theirs = (RIGHT_B[draws()].astype(float) - RIGHT_A[draws()]).mean(axis=1)
    assert ours.shape == (4000,)
    assert_same_distribution(ours, theirs)


def test_interval_equals_scipy() -> None:
    rows = np.stack([RIGHT_A, RIGHT_B], axis=1)
    ours = interval(bootstrap_differences(rows, mean_of(0), mean_of(1), resamples=20_000, seed=0))
    theirs = scipy.stats.bootstrap(
        (RIGHT_B.astype(float), RIGHT_A.astype(float)),
        lambda b, a, axis: np.mean(b, axis=axis) - np.mean(a, axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    # The ends are multiples of 1/N; two multiples are tolerated.
    assert ours == pytest.approx((theirs.low, theirs.high), abs=2.01 / N)


def test_interval_excludes_two_and_a_half_percent_at_either_end() -> None:
    """Of 100,001 equally spaced numbers, each quantile is known exactly."""
    spaced = np.random.default_rng(0).permutation(np.linspace(-1, 1, 100_001))
    assert interval(spaced) == pytest.approx((-0.95, 0.95), abs=1e-9)
    assert interval(spaced, 0.9) == pytest.approx((-0.9, 0.9), abs=1e-9)
    normal = scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    assert interval(normal) == pytest.approx(scipy.stats.norm.interval(0.95), abs=1e-3)


def test_the_multinomial_bootstrap_of_class_means_equals_drawing_images() -> None:
    rows = np.stack([LABELS, RIGHT_A, RIGHT_B], axis=1)
    ours = bootstrap_differences(rows, per_class_mean_of(1, 0), per_class_mean_of(2, 0), resamples=3000, seed=0)
    drawn = draws(3000)
    theirs = [per_class(RIGHT_B[i], LABELS[i]) - per_class(RIGHT_A[i], LABELS[i]) for i in drawn]
    assert_same_distribution(ours, np.array(theirs))
    whole = per_class_mean_of(1, 0)(np.ones((1, N)), rows)
    assert whole == pytest.approx(per_class(RIGHT_A, LABELS), abs=1e-12)


def test_captions_are_drawn_with_their_image() -> None:
    captions = RNG.integers(1, 6, N)
    hits_a, hits_b = (RNG.integers(0, captions + 1) for _ in range(2))
    rows = np.stack([hits_a, hits_b, captions], axis=1)
    ours = bootstrap_differences(rows, mean_of(0, 2), mean_of(1, 2), resamples=4000, seed=0)
    drawn = draws()
    theirs = (hits_b[drawn].sum(1) - hits_a[drawn].sum(1)) / captions[drawn].sum(1)
    assert_same_distribution(ours, theirs)


@pytest.mark.parametrize("copies", [1, 3])
def test_mean_average_precision_of_a_resample_equals_that_of_its_images(copies: int) -> None:
    rng = np.random.default_rng(2)
    targets = rng.random((80, 4)) < 0.3
    targets[:, 3] = False  # a class without positives
    scores = rng.normal(size=(80, 4)) + targets
    weights = rng.multinomial(80 * copies, np.full(80, 1 / 80), 6)
    ours = statistics._weighted_map(scores, targets, weights)
    for b in range(6):
        drawn = np.repeat(np.arange(80), weights[b])
        precisions = []
        for c in range(4):
            truth = targets[drawn][np.argsort(-scores[drawn, c], kind="stable"), c]
            places = np.flatnonzero(truth)
            precisions.append(np.mean((np.arange(len(places)) + 1) / (places + 1)) if len(places) else 0.0)
        assert ours[b] == pytest.approx(np.mean(precisions), abs=1e-12)


def test_mean_average_precision_differences_are_seeded_and_paired() -> None:
    rng = np.random.default_rng(3)
    targets = rng.random((60, 3)) < 0.4
    a, b = (rng.normal(size=(60, 3)) + targets for _ in range(2))
    ours = bootstrap_map_differences(a, b, targets, resamples=200, seed=4)
    np.testing.assert_array_equal(ours, bootstrap_map_differences(a, b, targets, resamples=200, seed=4))
    np.testing.assert_allclose(ours, -bootstrap_map_differences(b, a, targets, resamples=200, seed=4), atol=1e-15)
    assert not bootstrap_map_differences(a, a, targets, resamples=50, seed=4).any()


def test_results_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.stack([LABELS, RIGHT_A, RIGHT_B], axis=1)
    metrics = per_class_mean_of(1, 0), per_class_mean_of(2, 0)
    whole = bootstrap_differences(rows, *metrics, resamples=100, seed=0)
    monkeypatch.setattr(statistics, "_CHUNK", 64)
    np.testing.assert_allclose(bootstrap_differences(rows, *metrics, resamples=100, seed=0), whole, atol=1e-14)
