"""Signals that stop a run, and data that fail on one process."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
from typing import Any

import jax
import ml_collections
import pytest

from tclip_jax.parallel import agreement
from tclip_jax.parallel.agreement import FirstError
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import loop, session
from tclip_jax.training.metrics import Telemetry
from tclip_jax.training.preemption import INTERRUPTED, RESTART, PreemptionHandler, Stopped


def test_the_handler_catches_signals_and_restores_the_handlers_before_it() -> None:
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


@pytest.mark.slow
def test_a_signal_ends_a_run_with_a_checkpoint_and_a_trace(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    write = Telemetry.write

    def write_and_signal(self: Telemetry, step: int, metrics: Any) -> None:
        write(self, step, metrics)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Telemetry, "write", write_and_signal)
    config.checkpoint.every, config.log_every, config.profile_steps = 100, 2, (1, 2)
    with caplog.at_level(logging.INFO), pytest.raises(Stopped) as stopped:
        loop.train(config, tmp_path / "run")
    assert stopped.value.code == RESTART
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, 6)) and f"stopping after a signal: step {steps[-1]} is saved" in caplog.text
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(steps[-1])]
    assert "step 2/8  loss " in caplog.text and "compile " in caplog.text
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert f"{tmp_path}/run: a new run of 8 steps" in caplog.messages
    with caplog.at_level(logging.INFO):
        loop.train(config, tmp_path / "run")
    assert f"{tmp_path}/run: resumed from step 5 of 8" in caplog.messages and "step 8/8  loss " in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_a_process_without_data_repeats_its_batch_until_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        yield "first"
        raise OSError("the store is away")

    data: Any = broken()
    failure = FirstError()
    batch = session._next_batch(data, None, failure)
    with pytest.raises(OSError, match="away"):  # a single process raises at once
        session._next_batch(data, batch, failure)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    data = broken()
    next(data)
    assert session._next_batch(data, batch, failure) == "first" and "away" in str(failure.error)
    # There is no batch before the first: all processes raise the error of one.
    monkeypatch.setattr(agreement, "allgather_json", lambda line: [line, "shard 7 is gone"])
    with pytest.raises(StopIteration):
        session._next_batch(data, None, FirstError())
    monkeypatch.setattr(session, "next", lambda data: "a batch", raising=False)
    with pytest.raises(agreement.FailedElsewhere, match="process 1: shard 7 is gone"):
        session._next_batch(data, None, FirstError())
