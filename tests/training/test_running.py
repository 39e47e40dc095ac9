"""The small parts that a long run is made of: notices, agreement, time, speed, the logger, batches, traces."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import time
from typing import Any

import jax
import ml_collections
import pytest

from tclip_jax.parallel import agreement as failures
from tclip_jax.parallel.agreement import FirstError
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import loop, session
from tclip_jax.training.input import ResumableIterator
from tclip_jax.training.metrics import MetricsLogger, Telemetry
from tclip_jax.training.preemption import INTERRUPTED, RESTART, PreemptionHandler, Stopped
from tclip_jax.training.timing import StepTimer, Throughput, Trace


def test_signals_are_notices_within_and_what_they_were_without() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with PreemptionHandler() as handler:
        assert handler.code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert handler.code == RESTART == 75
    with pytest.raises(KeyboardInterrupt), PreemptionHandler() as handler:
        os.kill(os.getpid(), signal.SIGINT)
        assert handler.code == INTERRUPTED == 130
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_every_second_belongs_to_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e12)
    timer = StepTimer()
    now[0] += 1
    with timer.during("evaluate"):
        now[0] += 2
        with timer.during("data"):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    assert timer.take() == {"step": 17, "evaluate": 10, "data": 4} and timer.now == "step"
    assert timer.take() == {"step": 0}


class Device:
    device_kind = "TPU v4"


def test_speed_and_the_line_in_the_log() -> None:
    speed = Throughput(100, int(55e9), [Device()] * 4, 2)  # type: ignore[list-item]
    first = speed.metrics({"step": 1.0, "compile": 30.0})
    assert first["images_per_second"] == 100 and first["images_per_second_per_device"] == 25
    assert first["mfu"] == pytest.approx(100 * 55e9 / (4 * 275e12)) and first["seconds/compile"] == 30
    assert speed.line(1, 9, {"loss": 1.0}) is None
    speed.metrics({"step": 0.5, "data": 0.5, "checkpoint": 1.0, "evaluate": 3.0})
    assert speed.line(2, 9, {"loss": 1.5}) == (
        "step 2/9: loss 1.5000, 66.7 images/s (16.7 per device), MFU 0.3%;"
        " time: checkpoint 2.8%, compile 83.3%, data 1.4%, evaluate 8.3%, step 4.2%"
    )
    assert "mfu" not in Throughput(8, 10, jax.devices()[:1], 0).metrics({"step": 1.0})


class Quiet:
    def write(self, step: int, metrics: Any) -> None: ...

    def score(self, step: int, metrics: Any) -> None: ...


def test_only_skipped_steps_in_a_row_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    quiet: Any = Quiet()
    logger = MetricsLogger(quiet, quiet, Throughput(8, 1, jax.devices()[:1], 0), steps=9, max_skipped=2)
    good, bad = {"loss": 1.0, "skipped_steps": 0.0}, {"loss": float("inf"), "skipped_steps": 1.0}
    for step, metrics in enumerate((bad, good, bad, good, bad), 1):
        logger.add(step, metrics)
    assert "step 3: loss is inf; the step is skipped" in caplog.text and "step 5" not in caplog.text
    logger.add(6, bad)
    with pytest.raises(ValueError, match="step 6: loss is inf; this is the last of 2 skipped steps in a row"):
        logger.flush()


def test_batches_without_a_usable_sample_in_a_row_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    quiet: Any = Quiet()
    logger = MetricsLogger(quiet, quiet, Throughput(8, 1, jax.devices()[:1], 0), steps=9, max_skipped=3)
    for step in (1, 2):
        logger.add(step, {"loss": 0.0, "skipped_steps": 1.0})
    logger.flush()
    assert "step 1: its batch has no usable sample; the step is skipped" in caplog.text
    logger.add(3, {"loss": 0.0, "skipped_steps": 1.0})
    with pytest.raises(
        ValueError, match=r"step 3: its batch has no usable .* last of 3 skipped steps .* see bad_samples\.jsonl"
    ):
        logger.flush()


class Counter:
    """An iterator whose first worker is killed after two batches, or after none if it comes back."""

    def __init__(self, lives: list[int]) -> None:
        self._next, self._lives = 0, lives.pop(0) if lives else 10**9

    def __next__(self) -> int:
        if not self._lives:
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        self._lives -= 1
        self._next += 1
        return self._next

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["next"]

    def close(self) -> None: ...


def test_batches_go_on_where_a_worker_died() -> None:
    lives = [2, 0]
    batches = ResumableIterator(lambda: Counter(lives))
    assert [next(batches) for _ in range(5)] == [1, 2, 3, 4, 5] and batches.position == {"next": 5}
    batches.seek({"next": 70})
    assert next(batches) == 71
    lives = [1, 0, 0, 0]
    batches = ResumableIterator(lambda: Counter(lives))
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        [next(batches) for _ in range(2)]


@pytest.mark.slow
def test_a_notice_ends_a_run_with_all_saved_and_a_trace(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    write = Telemetry.write

    def told(self: Telemetry, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Telemetry, "write", told)
    config.checkpoint.every, config.log_every, config.profile_steps = 100, 2, (1, 2)
    with caplog.at_level(logging.INFO), pytest.raises(Stopped) as stopped:
        loop.train(config, tmp_path / "run")
    assert stopped.value.code == RESTART
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, 6)) and f"stopping after a signal: step {steps[-1]} is saved" in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(steps[-1])]
    assert "step 2/8: loss " in caplog.text and "compile " in caplog.text
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    loop.train(config, tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_best_metric_that_nobody_measures_is_named_with_its_nearest() -> None:
    quiet: Any = Quiet()
    logger = MetricsLogger(quiet, quiet, Throughput(8, 1, jax.devices()[:1], 0), steps=9, max_skipped=2)
    logger.write(1, {"loss": 1.0, "digits/acc1": 0.5, "zero_shot_accuracy": 0.5})
    logger.check_measured("digits/acc1")
    message = r"best_metric: 'digits/acc' is not measured, so keep_best has no effect: .* such as digits/acc1"
    with pytest.raises(ValueError, match=message):
        logger.check_measured("digits/acc")


@pytest.mark.parametrize("own", [None, ValueError("the run's own")])
def test_a_trace_that_cannot_be_written(own: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no space for the trace")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with pytest.raises(type(own or RuntimeError("")), match="the run's own" if own else "no space"):  # noqa: SIM117
        with Trace(tmp_path, (1, 2)) as trace:
            trace.before(1)
            if own:
                raise own


def test_a_process_that_has_no_batch_takes_part_until_all_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield "first"
        raise OSError("the store is away")

    data: Any = broken()
    failure = FirstError()
    batch = session._next_batch(data, None, failure)
    with pytest.raises(OSError, match="away"):  # alone there is nobody to wait for
        session._next_batch(data, batch, failure)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    data = broken()
    next(data)
    assert session._next_batch(data, batch, failure) == "first" and "away" in str(failure.error)
    # The first of all batches cannot be replaced: all raise what one process met.
    monkeypatch.setattr(failures, "allgather_json", lambda line: [line, "shard 7 is gone"])
    with pytest.raises(StopIteration):
        session._next_batch(data, None, FirstError())
    monkeypatch.setattr(session, "next", lambda data: "a batch", raising=False)
    with pytest.raises(failures.FailedElsewhere, match="process 1: shard 7 is gone"):
        session._next_batch(data, None, FirstError())
