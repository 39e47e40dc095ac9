"""How fast a run is, and what it spends its time on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from tclip_jax.models.flops import peak_flops


class Speed:
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
