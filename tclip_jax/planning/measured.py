"""What a run has measured: its configuration, its devices, and the mean step of its metrics."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from tclip_jax.planning.hardware import Topology, recorded_topology
from tclip_jax.runs.config import read_config
from tclip_jax.runs.record import CONFIG, changes, in_words, last_record, read_metrics

LEAST = 10  # steps that a comparison needs
_FILLING = 2  # steps after a compilation in which the devices and the input pipeline start to overlap
# Keys of the configuration that determine the compiled step.
_STEP = (
    *("model", "dtype", "gradient_dtype", "remat", "attention", "mesh", "teacher", "ternary", "quantizer", "loss"),
    *("optimizer.name", "optimizer.mu_dtype", "optimizer.groups", "optimizer.ema_decay", "optimizer.clip_norm"),
    "optimizer.latent_clip",
    *("data.batch_size", "data.microbatches", "data.teacher_cache"),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Means over the comparable steps of a run.

    Attributes:
      first, last: the first and the last of these steps.
      steps: their number.
      seconds: seconds per step, those of data and checkpoints included.
      typical: median of the seconds per step, without checkpoints.
      data, checkpoint: fractions of the time spent waiting for data, and saving checkpoints.
      stalled: fraction of the time by which steps of more than twice the median are longer than the median.
      compiled: fraction of the steps in which a program was compiled.
      masked: fraction of the samples that are masked.
      skipped: number of skipped steps.
      compile_seconds: seconds of compilation in the latest start; None if not recorded.
      memory: the most bytes that a device has used; None if not recorded.
    """

    first: int
    last: int
    steps: int
    seconds: float
    typical: float
    data: float
    checkpoint: float
    stalled: float
    compiled: float
    masked: float
    skipped: int
    compile_seconds: float | None
    memory: float | None


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A run that `tclip train` has recorded.

    Attributes:
      workdir: its workdir.
      config: its resolved configuration.
      devices: its devices, as of `device_record`; {} if an older version did not record them.
      lines: lines of metrics.jsonl since the configuration or the devices changed last.
    """

    workdir: str
    config: ml_collections.ConfigDict
    devices: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def described_devices(self) -> str:
        """Number and kind of the devices, "" if they are not on record."""
        return f"{self.devices['count']:,} {self.devices['kind']}" if self.devices else ""

    def planned_config(self) -> ml_collections.ConfigDict:
        """Return the configuration with the number of slices that the run has found."""
        config = self.config.copy_and_resolve_references()
        if self.devices.get("shape"):
            config.mesh.slices = self.devices["slices"]
        return config


def read_run(workdir: epath.PathLike, expected: ml_collections.ConfigDict | None = None) -> RecordedRun:
    """Read the record of a run.

    Args:
      workdir: workdir of the run.
      expected: the configuration that the run should have; None for any.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: the run has no metrics, or the step of `expected` is another one.
    """
    read_config(workdir)  # checks it
    config = json.loads((epath.Path(workdir) / CONFIG).read_text())
    if expected is not None:
        changed = changes(config, json.loads(expected.to_json()))
        other = {key: values for key, values in changed.items() if key.startswith(_STEP)}
        if other:
            raise ValueError(f"{workdir} is a run of another configuration: {in_words(other)}; leave out --config")
    record = last_record(workdir)
    lines = [line for line in read_metrics(workdir) if line["step"] > record.get("step", 0)]
    if not any("seconds/step" in line for line in lines):
        raise ValueError(f"{workdir}/metrics.jsonl has no steps of the latest configuration: let the run train first")
    return RecordedRun(str(workdir), ml_collections.ConfigDict(config), record.get("devices") or {}, lines)


def find_topology(run: RecordedRun, topology: Topology | None) -> Topology:
    """Return the topology of a run: the one on record, or `topology`.

    Raises:
      ValueError: it is not on record and `topology` is None, or both differ in chip, shape or number.
    """
    recorded = recorded_topology(run.devices) if run.devices else None
    described = run.described_devices
    if topology is None:
        if recorded is None:
            reason = (
                f"has run on {described}, for which there are no figures"
                if described
                else "has not recorded its devices"
            )
            raise ValueError(f"{run.workdir} {reason}: add --topology with the chips to compare it with")
        return recorded
    if recorded is not None and recorded.kind != topology.kind:
        raise ValueError(f"{run.workdir} has run on {described}, not on {topology.name}: leave out --topology")
    slices = 1 if topology.is_gpu else run.devices.get("slices", 1)
    if run.devices and run.devices["count"] != topology.devices * slices:
        raise ValueError(f"{run.workdir} has run on {described}, {topology.name} has {topology.devices:,} devices")
    if recorded is not None and sorted(recorded.shape) != sorted(topology.shape):
        raise ValueError(f"{run.workdir} has run on {recorded.name}, not on {topology.name}: leave out --topology")
    return topology


def measure(run: RecordedRun) -> Measured:
    """Compute the means over the steps that can be compared with a plan.

    These are the steps since the configuration changed last, without those that compile and the two after each of
    them, in which devices and input do not overlap yet.

    Raises:
      ValueError: there are fewer than `LEAST`.
    """
    steps = [line for line in run.lines if "seconds/step" in line]
    starts = {line["step"] for line in steps if "seconds/compile" in line}
    filling = {start + i for start in starts for i in range(_FILLING + 1)}
    steady = [line for line in steps if line["step"] not in filling]
    if len(steady) < LEAST:
        raise ValueError(
            f"{run.workdir}/metrics.jsonl has {len(steady)} steps that can be compared, without the first"
            f" {_FILLING + 1} of a start: {LEAST} are needed"
        )
    waits = [_seconds(line, "step", "data") for line in steady]
    whole = sum(waits) + _total(steady, "seconds/checkpoint")
    typical = statistics.median(waits)
    compile_seconds = [line["seconds/compile"] for line in steps if "seconds/compile" in line]
    return Measured(
        first=steady[0]["step"],
        last=steady[-1]["step"],
        steps=len(steady),
        seconds=whole / len(steady),
        typical=typical,
        data=_total(steady, "seconds/data") / whole,
        checkpoint=_total(steady, "seconds/checkpoint") / whole,
        stalled=sum(wait - typical for wait in waits if wait > 2 * typical) / whole,
        compiled=sum(bool(line.get("programs_compiled")) for line in steady) / len(steady),
        masked=_total(steady, "bad_samples") / len(steady) / run.config.data.batch_size,
        skipped=int(_total(steady, "skipped_steps")),
        compile_seconds=compile_seconds[-1] if compile_seconds else None,
        memory=max((line["memory_peak_bytes"] for line in run.lines if "memory_peak_bytes" in line), default=None),
    )


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name) or 0.0 for line in lines)


def _seconds(line: Mapping[str, Any], *phases: str) -> float:
    return sum(line.get(f"seconds/{phase}", 0.0) for phase in phases)
