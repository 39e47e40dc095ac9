"""The log of a run: a line every few steps, and one for each evaluation."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import jax
import pytest

from tclip_jax.log import JsonFormatter
from tclip_jax.training.step_log import StepLog, duration, evaluation_parts
from tclip_jax.training.timing import Throughput


class Device:
    device_kind = "TPU v4"


def logged(
    every: int, steps: list[dict[str, float]], caplog: pytest.LogCaptureFixture, devices: Any = None
) -> list[str]:
    """Logs these steps of a run of nine, and returns the lines."""
    log = StepLog(Throughput(100, int(55e9), devices or jax.devices()[:1]), 9, every)
    with caplog.at_level(logging.INFO):
        for step, metrics in enumerate(steps, 1):
            log.step(step, metrics)
    return caplog.messages


def test_a_line_has_loss_terms_rates_eta_and_the_phases_of_its_interval(caplog: pytest.LogCaptureFixture) -> None:
    first = {"loss": 9.0, "loss/task": 9.0, "seconds/step": 1.0, "seconds/compile": 30.0}
    second = {
        "loss": 1.5,
        "loss/crd": 0.25,
        "loss/task": 1.0,
        "seconds/step": 0.5,
        "seconds/data": 0.5,
        "seconds/checkpoint": 1.0,
        "seconds/evaluate": 3.0,
    }
    third = {"loss": 12.25, "loss/task": 12.25, "seconds/step": 1.0}
    assert logged(2, [first, second, third, third], caplog, [Device()] * 4) == [
        # 6 s for the two steps without compilation: 21 s for the other seven. 200 images in 3 s.
        "step 2/9  loss  1.5000 (crd 0.2500, task 1.0000)     66.7 images/s  MFU  0.3%  ETA 0:00:21"
        "  data 1%, checkpoint 3%, evaluate 8%, compile 83%",
        # 8 s for four steps.
        "step 4/9  loss 12.2500    100.0 images/s  MFU  0.5%  ETA 0:00:10",
    ]


def test_the_last_step_has_a_line_and_zero_means_none(caplog: pytest.LogCaptureFixture) -> None:
    step = {"loss": 1.0, "loss/task": 1.0, "seconds/step": 1.0}
    lines = logged(4, [step] * 9, caplog)
    assert [line.split()[1] for line in lines] == ["4/9", "8/9", "9/9"] and "ETA 0:00:00" in lines[-1]
    caplog.clear()
    assert logged(0, [step] * 9, caplog) == []


def test_bad_samples_are_one_count_of_each_kind_and_interval(caplog: pytest.LogCaptureFixture) -> None:
    step = {"loss": 1.0, "loss/task": 1.0, "seconds/step": 1.0, "bad/corrupt_image": 1.0, "bad/no_caption": 0.0}
    other = step | {"bad/corrupt_image": 0.0, "bad/no_caption": 2.0}
    good = step | {"bad/corrupt_image": 0.0}
    lines = logged(2, [step, other, good, good, step, step], caplog)
    assert [line.rpartition("  ")[2] for line in lines] == [
        "bad: corrupt_image 1, no_caption 2",
        "ETA 0:00:05",
        "bad: corrupt_image 2",
    ]


def test_json_has_the_metrics_as_keys() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("tclip_jax.training.step_log")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log = StepLog(Throughput(100, 1, jax.devices()[:1]), 20, 2)
        rates = {"images_per_second": 1.0, "learning_rate": 0.5}
        for step, bad in ((1, 1.0), (2, 0.0)):
            log.step(
                step,
                {"loss": float("nan"), "loss/task": 3.0, "seconds/step": 2.0, "bad/no_image": bad, **rates},
            )
        log.evaluation(2, {"a/acc1": 0.25}, 1.0)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    of_steps, of_evaluation = map(json.loads, stream.getvalue().splitlines())
    assert of_steps["level"] == "INFO" and of_steps["message"].startswith("step  2/20  loss     nan (task 3.0000)")
    assert {key: of_steps[key] for key in ("step", "loss", "loss/task", "learning_rate", "eta_seconds")} == {
        "step": 2,
        "loss": None,
        "loss/task": 3.0,
        "learning_rate": 0.5,
        "eta_seconds": 36,
    }
    # Rates and bad samples are those of the interval.
    assert of_steps["images_per_second"] == 50.0
    assert of_steps["bad/no_image"] == of_steps["bad_samples"] == 1
    assert of_evaluation["message"] == "step  2/20  a/acc1 25.00%  (1.0 s)" and of_evaluation["a/acc1"] == 0.25


def test_an_evaluation_is_one_line() -> None:
    metrics = {"v/loss": 2.0, "v/loss/task": 1.5, "v/batch_accuracy": 0.5, "images_failed/v": 3.0}
    averages = {f"{name}_of_average": value / 2 for name, value in metrics.items() if name.startswith("v")}
    assert evaluation_parts(metrics | averages) == [
        "v/loss 2.0000 (average 1.0000)",
        "v/batch_accuracy 50.00% (average 25.00%)",
    ]
    # A suite: its averages, or the first metrics.
    suite = {f"s/{name}/acc1": 0.5 for name in "abcdefgh"}
    assert evaluation_parts({"s/acc1": 0.5, "evaluations_failed": 1.0} | suite) == ["s/acc1 50.00%"]
    assert evaluation_parts(suite)[-2:] == ["s/f/acc1 50.00%", "and 2 more in metrics.jsonl"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3661, "1:01:01"), (172_799, "47:59:59"), (172_800 + 7200, "2 d 2 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
