"""Time per phase, throughput, and profiler traces."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.training.timing import Compilations, StepTimer, Throughput, Trace, device_memory


def test_the_phases_share_out_all_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_throughput_and_mfu() -> None:
    throughput = Throughput(100, int(55e9), [Device()] * 4)  # type: ignore[list-item]
    first = throughput.metrics({"step": 1.0, "compile": 30.0})
    assert first["images_per_second"] == 100 and first["images_per_second_per_device"] == 25
    assert first["mfu"] == pytest.approx(100 * 55e9 / (4 * 275e12)) and first["seconds/compile"] == 30
    rates = throughput.rates({"step": 1.5, "data": 0.5, "checkpoint": 1.0, "evaluate": 3.0, "compile": 30.0}, 2)
    assert rates["images_per_second"] == pytest.approx(200 / 3)
    assert "mfu" not in Throughput(8, 10, jax.devices()[:1]).metrics({"step": 1.0})


def test_compilations_are_counted_while_a_run_lasts() -> None:
    double = jax.jit(lambda x: x * 2)
    inputs = [np.ones(size, np.float32) for size in (3, 4, 5)]
    with Compilations() as compilations:
        assert compilations.metrics() == {}
        for x in inputs[:2]:
            double(x)
        assert compilations.metrics() == {"programs_compiled": 2} and compilations.metrics() == {}
        double(inputs[0])
        assert compilations.metrics() == {}
    double(inputs[2])
    assert compilations.metrics() == {}


def test_the_memory_of_the_fullest_device() -> None:
    class Stated(Device):
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    devices: Any = [Stated({"peak_bytes_in_use": 5, "bytes_in_use": 9}), Stated({"peak_bytes_in_use": 7}), Stated(None)]
    assert device_memory(devices) == {"memory_peak_bytes": 7}
    assert device_memory(devices[2:]) == device_memory(jax.devices()) == {}


@pytest.mark.parametrize("error", [None, ValueError("the run's own")])
def test_a_failing_trace_raises_unless_the_run_fails(
    error: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no space for the trace")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    with pytest.raises(type(error or RuntimeError("")), match="the run's own" if error else "no space"):  # noqa: SIM117
        with Trace(tmp_path, (1, 2)) as trace:
            trace.before(1)
            if error:
                raise error
