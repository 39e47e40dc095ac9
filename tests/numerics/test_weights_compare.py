from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tclip_jax.numerics.weights import compare_taps, end_metrics, first_over, measure, ulp_distance

FLOATS = arrays.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32))


@given(a=FLOATS, seed=st.integers(0, 99))
def test_figures_are_those_of_their_definitions(a: np.ndarray, seed: int) -> None:
    b = a + np.random.default_rng(seed).normal(0, 1, a.shape).astype(np.float32)
    measured, x, y = measure("tap", a, b), a.astype(np.float64), b.astype(np.float64)
    rms = np.sqrt(np.mean(y * y))
    np.testing.assert_allclose(measured.max_abs, max(abs(x - y)))
    np.testing.assert_allclose(measured.relative, max(abs(x - y) / (abs(y) + rms)))
    np.testing.assert_allclose(measured.rmse, np.linalg.norm(x - y) / np.sqrt(len(x)))
    if x.any():
        np.testing.assert_allclose(measured.cosine, x @ y / np.linalg.norm(x) / np.linalg.norm(y), atol=1e-12)
    assert sum(measured.ulp_counts) == measured.size == len(a) and measured.nonfinite == 0


@given(a=FLOATS, steps=st.integers(0, 20))
def test_ulp_counts_the_floats_between(a: np.ndarray, steps: int) -> None:
    b = a
    for _ in range(steps):
        b = np.nextafter(b, np.float32(np.inf))
    np.testing.assert_array_equal(ulp_distance(a, b), steps)
    np.testing.assert_array_equal(ulp_distance(b, a), steps)


def test_ulp_across_zero() -> None:
    tiny = np.float32(1e-45)
    measured = ulp_distance(np.array([-0.0, -tiny, 1.0], np.float32), np.array([0.0, tiny, -1.0], np.float32))
    np.testing.assert_array_equal(measured, [0, 2, 2 * 0x3F800000])


def test_histogram_bins_are_powers_of_two() -> None:
    a = np.ones(6, np.float32)
    b = a + np.float32(2**-23) * np.array([0, 1, 2, 3, 4, 7], np.float32)
    assert measure("tap", a, b).ulp_counts[:5] == (1, 1, 2, 2, 0)


def test_identical_arrays() -> None:
    for a in (np.zeros(3, np.float32), np.arange(5, dtype=np.float32)):
        measured = measure("tap", a, a)
        assert (measured.max_abs, measured.relative, measured.rmse, measured.ulp_max) == (0, 0, 0, 0)
        assert measured.cosine == 1 and not measured.over(0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_over_any_budget(value: float) -> None:
    a = np.array([1, value, 3], np.float32)
    for pair in ((a, np.ones(3, np.float32)), (np.ones(3, np.float32), a), (a, a)):
        measured = measure("tap", *pair)
        assert measured.nonfinite == 1 and measured.over(1e9) and np.isfinite(measured.max_abs)


def test_relative_error_of_a_zero_reference_is_infinite() -> None:
    assert measure("tap", np.full(2, 1e-9, np.float32), np.zeros(2, np.float32)).relative == np.inf


def test_one_huge_activation_hides_no_error_elsewhere() -> None:
    reference = np.ones(768, np.float32)
    reference[0] = 100
    ours = reference + np.float32(1e-3) * (np.arange(768) == 5)
    assert measure("tap", ours, reference).relative > 1e-4


def test_shapes_and_names_must_agree() -> None:
    a = {"image/embedded": np.zeros((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"image/embedded has shape \(2, 3\): the reference's is \(2, 4\)"):
        compare_taps(a, {"image/embedded": np.zeros((2, 4), np.float32)})
    for pair in ((a, {}), ({}, a)):
        with pytest.raises(ValueError, match="only one of the models has image/embedded"):
            compare_taps(*pair)


def test_first_over_budget_of_each_tower() -> None:
    one = np.ones(4, np.float32)
    errors = {"image/a": 0, "image/b": 1e-3, "image/c": 1e-2, "text/a": 1e-5}
    differences = compare_taps(
        {name: one + np.float32(error) for name, error in errors.items()}, dict.fromkeys(errors, one)
    )
    assert first_over(differences, 1e-4) == {"image": "image/b"}
    assert first_over(differences, 1e-6) == {"image": "image/b", "text": "text/a"}
    assert first_over(differences, 0.1) == {}


def test_end_metrics_against_a_naive_computation() -> None:
    rng = np.random.default_rng(0)

    def taps() -> dict[str, np.ndarray]:
        return {name: rng.standard_normal((5, 8)).astype(np.float32) for name in ("image/embedding", "text/embedding")}

    ours, theirs = taps(), taps()
    measured = end_metrics(ours, theirs, (2.0, 3.0))

    def classes(taps: dict[str, np.ndarray], scale: float) -> np.ndarray:
        e = np.exp(scale * np.float64(taps["image/embedding"]) @ np.float64(taps["text/embedding"]).T)
        return e / e.sum(axis=1, keepdims=True)

    q, p = classes(ours, 2.0), classes(theirs, 3.0)
    kl = [sum(p[i, j] * np.log(p[i, j] / q[i, j]) for j in range(5)) for i in range(5)]
    np.testing.assert_allclose((measured["kl_mean"], measured["kl_max"]), (np.mean(kl), max(kl)))
    assert measured["agreement"] == np.mean([p[i].argmax() == q[i].argmax() for i in range(5)])
    assert end_metrics(ours, ours, (2.0, 2.0)) == {"agreement": 1, "kl_mean": 0, "kl_max": 0}
