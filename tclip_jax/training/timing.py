"""Time per phase, throughput, MFU, compilations and memory of a run, and profiler traces for xprof."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import jax
from etils import epath

from tclip_jax.models.flops import peak_flops

Phase = Literal["compile", "data", "step", "checkpoint", "evaluate"]


class StepTimer:
    """Measures the seconds spent in each phase since the last call of `take`, by the monotonic clock.

    The phase `step` includes everything outside the others: dispatching, waiting for the devices, writing metrics.

    Attributes:
      now: the current phase.
      since: the time at which it began, by `time.monotonic()`.
    """

    def __init__(self) -> None:
        self.now: Phase = "step"
        self.since = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Set the phase of a block."""
        before = self.now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call, and reset them."""
        self._enter(self.now)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self._seconds[self.now] = self._seconds.get(self.now, 0.0) + now - self.since
        self.now, self.since = phase, now


class Throughput:
    """Computes images per second and MFU.

    MFU (model FLOPs utilization) is FLOPs of a pair · pairs / (seconds · devices · peak FLOP/s of a device). The FLOPs
    are those of `models.flops.train_flops`, without the recomputation of `remat`. The seconds are those of the phases
    step, data and checkpoint.

    Args:
      pairs: image-text pairs in a global batch.
      flops: model FLOPs per pair.
      devices: all devices of the run.
    """

    def __init__(self, pairs: int, flops: int, devices: Iterable[jax.Device]) -> None:
        kinds = [device.device_kind for device in devices]
        self._pairs, self._devices = pairs, len(kinds)
        peak = peak_flops(kinds[0])
        self._at_peak = peak and len(kinds) * peak / flops

    def metrics(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of one step, from its seconds by phase."""
        return self.rates(seconds, 1) | {f"seconds/{phase}": value for phase, value in seconds.items()}

    def rates(self, seconds: Mapping[str, float], steps: int) -> dict[str, float]:
        """Return `images_per_second`, also per device, and `mfu` if the device's peak is known."""
        spent = sum(seconds.get(phase, 0.0) for phase in ("step", "data", "checkpoint"))
        rate = self._pairs * steps / max(spent, 1e-9)
        mfu = {"mfu": rate / self._at_peak} if self._at_peak else {}
        return {"images_per_second": rate, "images_per_second_per_device": rate / self._devices} | mfu


class Compilations:
    """Counts the programs that this process compiles, or reads from the compile cache; a context manager."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self._count = 0

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._add)

    def metrics(self) -> dict[str, float]:
        """Return `programs_compiled` since the last call, {} if there are none."""
        count, self._count = self._count, 0
        return {"programs_compiled": float(count)} if count else {}

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        self._count += event == self._EVENT


def device_memory(devices: Iterable[jax.Device]) -> dict[str, float]:
    """Return `memory_peak_bytes`: the most memory that one of these devices has used so far; {} where it is unknown."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [float(peak) for peak in peaks if peak is not None]
    return {"memory_peak_bytes": max(known)} if known else {}


_logger = logging.getLogger(__name__)


class Trace:
    """Traces process 0 from the first to the last of `steps` with jax.profiler, into `<workdir>/profile`.

    A context manager: its exit writes a trace that has not ended.
    """

    def __init__(self, workdir: epath.PathLike, steps: tuple[int, ...]) -> None:
        self._folder, self._running = epath.Path(workdir) / "profile", False
        self._first, self._last = steps if steps and jax.process_index() == 0 else (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as failure:
            if error is None:
                raise
            # The error of the run is raised; this one is logged.
            _logger.error("%s: the trace could not be written: %s", self._folder, failure)

    def before(self, step: int) -> None:
        """Start the trace, if `step` is the first; call it before the step is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """End the trace after the last step, whose metrics it waits for; call it after the step is dispatched."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.__exit__(None, None, None)
