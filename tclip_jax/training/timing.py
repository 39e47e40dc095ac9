"""Where a run's time goes, how fast it is, and a trace of chosen steps for xprof."""

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
    """Seconds spent in each phase since they were last taken, by the monotonic clock.

    `step` is the phase between the others: dispatching, waiting for the device, and writing what was measured.

    Attributes:
      now: the phase that the run is in.
      since: when it came there, by `time.monotonic()`.
    """

    def __init__(self) -> None:
        self.now: Phase = "step"
        self.since = time.monotonic()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The block is of this phase."""
        before = self.now
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def take(self) -> dict[str, float]:
        """The seconds of each phase that had any, which are then counted from zero."""
        self._enter(self.now)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self._seconds[self.now] = self._seconds.get(self.now, 0.0) + now - self.since
        self.now, self.since = phase, now


class Throughput:
    """Metrics of every step, and a line for the log every so many steps.

    MFU, the share of the devices' peak that the model uses: FLOPs of a pair (`models.flops.train_flops`, without what
    `remat` computes again) · pairs / (seconds · devices · peak FLOP/s of one). Seconds are those of steps, data and
    checkpoints; compiling and evaluating are no part of it.

    Args:
      pairs: images in a step, over all devices.
      flops: of the model, per pair.
      devices: that the run is on.
      log_every: steps between lines; 0 for none.
    """

    def __init__(self, pairs: int, flops: int, devices: Iterable[jax.Device], log_every: int) -> None:
        kinds = [device.device_kind for device in devices]
        self._pairs, self._devices, self._log_every = pairs, len(kinds), log_every
        peak = peak_flops(kinds[0])
        self._at_peak = peak and len(kinds) * peak / flops
        self._seconds: dict[str, float] = {}
        self._steps = 0

    def metrics(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Of one step that took so many seconds by phase."""
        self._steps += 1
        for phase, value in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + value
        return self._rates(seconds, 1) | {f"seconds/{phase}": value for phase, value in seconds.items()}

    def line(self, step: int, steps: int, metrics: Mapping[str, Any]) -> str | None:
        """What the log says of the steps since the last line, with the loss of `metrics`; None where none is due."""
        if not self._log_every or step % self._log_every:
            return None
        rates, total = self._rates(self._seconds, self._steps), sum(self._seconds.values())
        shares = ", ".join(f"{phase} {value / total:.1%}" for phase, value in sorted(self._seconds.items()))
        mfu = f", MFU {rates['mfu']:.1%}" if "mfu" in rates else ""
        text = (
            f"step {step}/{steps}: loss {metrics['loss']:.4f}, {rates['images_per_second']:.1f} images/s"
            f" ({rates['images_per_second_per_device']:.1f} per device){mfu}; time: {shares}"
        )
        self._seconds, self._steps = {}, 0
        return text

    def _rates(self, seconds: Mapping[str, float], steps: int) -> dict[str, float]:
        spent = sum(seconds.get(phase, 0.0) for phase in ("step", "data", "checkpoint"))
        rate = self._pairs * steps / max(spent, 1e-9)
        mfu = {"mfu": rate / self._at_peak} if self._at_peak else {}
        return {"images_per_second": rate, "images_per_second_per_device": rate / self._devices} | mfu


_logger = logging.getLogger(__name__)


class Trace:
    """Traces process 0 from the beginning of the first to the end of the last of `steps` into `<workdir>/profile`.

    A context manager: a run that ends between them keeps what there is.
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
            _logger.error("%s: the trace could not be written: %s", self._folder, failure)  # the run's own error counts

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """To be called after; at the last step it waits for the metrics."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.__exit__(None, None, None)
