"""Failing evaluations are logged at once, counted, and end the run after the third in a row."""

from __future__ import annotations

import numpy as np
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.evaluation.results import Result
from tclip_jax.evaluation.runner import Report
from tclip_jax.runs.config import EvalConfig
from tclip_jax.training import evaluation
from tclip_jax.training.evaluation import Evaluation, EvaluationError

LOST = {"digits": "no usable image: 99 x unreadable image"}


def result(**failed: int) -> Result:
    metrics = {"acc1": 0.5, "acc5": np.nan}
    return Result("digits", "", "", "zeroshot_classification", metrics, samples=9, failed=failed)


GOOD = Report({"digits": result()}, {})


def run(monkeypatch: pytest.MonkeyPatch, name: str, *reports: Report) -> list[dict[str, float]]:
    """Returns the metrics of an evaluation that is called once per report."""
    remaining = list(reports)
    monkeypatch.setattr(evaluation, "Encoder", lambda *_, **__: None)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: remaining.pop(0))
    evaluate, model = Evaluation(EvalConfig(source="digits", name=name)), Preprocess(16)
    return [evaluate(model, None) for _ in reports]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "suffix", "key"), [("", "", "config.eval"), ("a", "/a", "config.evals a")])
def test_a_first_evaluation_without_a_result_ends_the_run(
    name: str, suffix: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvaluationError, match=rf"^{key}: no result at the first evaluation: digits: no usable") as end:
        run(monkeypatch, name, Report({}, LOST))
    assert end.value.metrics == {"evaluations_failed": 1.0, f"evaluations_failed{suffix}": 1.0}


def test_the_third_failure_in_a_row_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = Report({}, LOST)
    metrics = run(monkeypatch, "", GOOD, lost, lost, GOOD, lost, lost)
    assert metrics == [
        {"zero_shot_accuracy": 0.5} if good else {"evaluations_failed": 1.0} for good in (1, 0, 0, 1, 0, 0)
    ]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["config.eval: no result: digits: no usable image: 99 x unreadable image"] * 4
    with pytest.raises(EvaluationError, match=r"^config\.eval: no result 3 times in a row: digits: no usable image"):
        run(monkeypatch, "", GOOD, lost, lost, lost)


def test_a_failing_data_set_among_several_ends_the_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    partly = Report({"digits": result()}, {"mnist": "no such folder"})
    (metrics,) = run(monkeypatch, "a", partly)
    assert metrics == {"a/acc1": 0.5, "evaluations_failed": 1.0, "evaluations_failed/a": 1.0}
    with pytest.raises(EvaluationError, match="no result 3 times in a row: mnist: no such folder"):
        run(monkeypatch, "a", partly, partly, partly)


def test_excluded_images_are_counted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    failed = {"unreadable image": 3, "label missing": 1}
    (metrics,) = run(monkeypatch, "a", Report({"digits": result(**failed)}, {}))
    assert metrics == {"a/acc1": 0.5, "images_failed/a": 4.0}
    assert "evaluation of digits: excluded images: 3 x unreadable image, 1 x label missing" in caplog.text


def test_counts_of_failures_do_not_mark_an_evaluation_as_done() -> None:
    named = Evaluation(EvalConfig(source="digits", name="a"))
    assert named.has_metrics(["a/acc1"]) and not named.has_metrics(
        ["evaluations_failed", "evaluations_failed/a", "loss"]
    )
    unnamed = Evaluation(EvalConfig(source="digits"))
    assert unnamed.has_metrics(["zero_shot_accuracy"]) and not unnamed.has_metrics(
        ["evaluations_failed", "images_failed"]
    )
