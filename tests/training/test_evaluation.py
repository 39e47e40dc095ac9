"""Failing evaluations are logged at once, counted, and end the run after the third in a row."""

from __future__ import annotations

import numpy as np
import pytest

from tclip_jax.evaluation.results import Result
from tclip_jax.evaluation.runner import Report
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.runs.config import EvalConfig, base_config, run_config
from tclip_jax.training import evaluation
from tclip_jax.training.build import Build
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
    monkeypatch.setattr(evaluation, "Model", lambda *_: None)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: remaining.pop(0))
    run = run_config(base_config())
    evaluate, build = Evaluation(EvalConfig(source="digits", name=name), run), Build(run, make_mesh(), None)
    return [evaluate({"clip": None}, build, None) for _ in reports]


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


def test_excluded_images_are_counted_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    several, one = {"unreadable image": 3, "label missing": 1}, {"unreadable image": 1}
    reports = [Report({"digits": result(**failed)}, {}) for failed in (several, several, one)]
    metrics = run(monkeypatch, "a", *reports)
    assert metrics == [{"a/acc1": 0.5, "images_failed/a": count} for count in (4.0, 4.0, 1.0)]
    assert [message for message in caplog.messages if message.startswith("evaluation of")] == [
        f"evaluation of digits: excluded images: {reasons}"
        for reasons in ("3 x unreadable image, 1 x label missing", "1 x unreadable image")
    ]


def test_counts_of_failures_do_not_mark_an_evaluation_as_done() -> None:
    run = run_config(base_config())
    named = Evaluation(EvalConfig(source="digits", name="a"), run)
    assert named.has_metrics(["a/acc1"]) and not named.has_metrics(
        ["evaluations_failed", "evaluations_failed/a", "loss"]
    )
    unnamed = Evaluation(EvalConfig(source="digits"), run)
    assert unnamed.has_metrics(["zero_shot_accuracy"]) and not unnamed.has_metrics(
        ["evaluations_failed", "images_failed"]
    )
    loss = Evaluation(EvalConfig(kind="loss", source="digits"), run)
    assert loss.has_metrics(["validation/loss"]) and not loss.has_metrics(["zero_shot_accuracy", "loss"])
