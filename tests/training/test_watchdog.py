"""The watchdog names the processes that are behind, and dumps their stacks."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import time

import jax
import pytest

from tclip_jax.training import watchdog
from tclip_jax.training.timing import StepTimer
from tclip_jax.training.watchdog import Heartbeat, Watchdog, slowest, stall_report


def beat(step: int, phase: str = "step", silent: float = 0.0) -> Heartbeat:
    return Heartbeat(step, phase, 60.0, "host, process 7", 3, (), silent)


@pytest.mark.parametrize(
    ("beats", "behind"),
    [
        ([beat(9), beat(8), beat(9)], (1,)),
        ([beat(9), beat(9, "data"), beat(9)], (1,)),  # the others wait for process 1
        ([beat(9, "data"), beat(9, "checkpoint"), beat(9)], (0, 1)),
        ([beat(9), beat(9)], (0, 1)),
        ([beat(9), beat(9, silent=50), beat(8)], (1,)),
    ],
)
def test_the_slowest_processes(beats: list[Heartbeat], behind: tuple[int, ...]) -> None:
    assert slowest(dict(enumerate(beats)), silence=40) == behind


def test_the_report_is_one_line() -> None:
    beats = {0: beat(9), 1: beat(8, "data"), 2: beat(9, silent=50)}
    assert stall_report(beats, (1,), 40) == (
        "process 1 (host, process 7) is in step 8, waiting for data for 60 s; the others are in step 9"
    )
    assert "waiting for the devices for 110 s, no heartbeat for 50 s" in stall_report(beats, (2,), 40)
    assert stall_report(dict(enumerate([beat(9)] * 10)), tuple(range(10)), 40).endswith("; 2 more")


def until(text: str, caplog: pytest.LogCaptureFixture) -> None:
    deadline = time.monotonic() + 600
    while text not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.01)


def test_a_single_stalled_process(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    timer = StepTimer()
    with caplog.at_level(logging.ERROR), Watchdog(tmp_path, timer, 0.002) as dog:
        dog.step(3)
        with timer.during("data"):
            until("is in step 3, waiting for data for", caplog)
            time.sleep(0.3)
        assert (
            caplog.text.count("no step has ended") == 1 and "in test_a_single_stalled_process" in capfd.readouterr().err
        )
        dog.step(4)  # a second stall is reported too
        until("is in step 4", caplog)
    assert not list(tmp_path.iterdir())


def test_compiling_and_evaluating_have_no_limit(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    timer = StepTimer()
    with Watchdog(tmp_path, timer, 0.002) as dog, timer.during("evaluate"):
        dog.step(1)
        time.sleep(0.4)
    assert caplog.text == ""


def test_process_0_names_another_process_and_exits(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands for process 1, whose heartbeats continue while its step does not change."""
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 2)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    (tmp_path / "heartbeats").mkdir()
    with Watchdog(tmp_path, StepTimer(), 0.02, leave=True) as dog:
        dog.step(5)
        for number in range(600):
            other = Heartbeat(4, "data", 10.0, "other", number)
            path = tmp_path / "heartbeats" / "1.json"
            path.with_suffix(".new").write_text(json.dumps(other._asdict()))
            path.with_suffix(".new").rename(path)
            time.sleep(0.05)
            if left:
                break
    assert left[0] == 69
    assert "process 1 (other) is in step 4, waiting for data for 10 s; the others are in step 5" in caplog.text
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["behind"] == [1]
    assert jax.process_index() == 0


def test_waiting_for_a_compiling_process_is_no_stall(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 2)
    (tmp_path / "heartbeats").mkdir()
    with Watchdog(tmp_path, StepTimer(), 0.02) as dog:
        dog.step(1)
        for number in range(60):  # three times the limit
            path = tmp_path / "heartbeats" / "1.json"
            path.with_suffix(".new").write_text(json.dumps(Heartbeat(0, "compile", 9.0, "other", number)._asdict()))
            path.with_suffix(".new").rename(path)
            time.sleep(0.06)
    assert caplog.text == ""
