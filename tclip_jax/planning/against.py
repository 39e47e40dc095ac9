"""A run beside its plan: where the run falls short, and what that suggests. Each rule states its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tclip_jax.pages import aligned
from tclip_jax.planning.hardware import recorded_topology
from tclip_jax.planning.measured import Measured, RecordedRun
from tclip_jax.planning.plan import Plan, between

# Fractions above which a run falls short: of its time (waiting for data, checkpoints, stalls), of its steps (compiled),
# of its samples (masked), of the plan's time at peak rates (network), and the measured over the planned memory.
WAITING, SAVING, STALLING, COMPILING, MASKING, SENDING, OCCUPYING = 0.05, 0.05, 0.05, 0.05, 0.01, 0.25, 1.1
_GIB = 2**30


class Finding(NamedTuple):
    """What a rule says of a run.

    Attributes:
      rule: name of the rule; "as planned" if none applies, "other devices" if speed and memory are not compared.
      text: the numbers, and what they suggest.
    """

    rule: str
    text: str

    @property
    def falls_short(self) -> bool:
        return self.rule not in ("as planned", "other devices")


def compare(run: RecordedRun, measured: Measured, plan: Plan) -> list[Finding]:
    """Return what the measured steps of a run say beside its plan, the first thing to look at first."""
    findings = list(_lost(measured, plan))
    if run.devices and recorded_topology(run.devices) is None:
        text = f"speed and memory of {run.described_devices} are not compared with those of {plan.topology.name}"
        return [*findings, Finding("other devices", text)]
    findings += [*_slow(measured, plan), *_memory(measured, plan)]
    if findings:
        return findings
    slow, fast = plan.estimate.slow.seconds, plan.estimate.fast.seconds
    return [Finding("as planned", f"{measured.seconds:.4f} s a step are between {fast:.4f} and {slow:.4f} s")]


def _lost(measured: Measured, plan: Plan) -> Iterator[Finding]:
    """Yield where time and samples are lost outside the compiled step."""
    if measured.data > WAITING:
        yield Finding(
            "input-bound",
            f"waits for data {measured.data:.1%} of the time (more than {WAITING:.0%}): measure the input alone with"
            f" `tclip data bench --step-seconds {plan.estimate.slow.seconds:.2g}`, raise config.data.workers, or store"
            " smaller images",
        )
    if measured.compiled > COMPILING:
        yield Finding(
            "recompiling",
            f"programs were compiled in {measured.compiled:.1%} of the steps (more than {COMPILING:.0%}): a shape or a"
            " constant changes; JAX_LOG_COMPILES=1 names the programs",
        )
    if measured.stalled > STALLING:
        yield Finding(
            "stalls",
            f"steps of more than twice the median take {measured.stalled:.1%} of the time (more than {STALLING:.0%}):"
            " trace some of them (config.profile_steps), look at the other processes of the hosts",
        )
    if measured.checkpoint > SAVING:
        yield Finding(
            "checkpoints",
            f"saving takes {measured.checkpoint:.1%} of the time (more than {SAVING:.0%}): save less often"
            " (config.checkpoint.every, every_minutes) or to faster storage",
        )
    if measured.masked > MASKING:
        yield Finding(
            "padding",
            f"{measured.masked:.1%} of the samples are masked (more than {MASKING:.0%}), and computed for nothing:"
            " bad_samples.jsonl has the reasons",
        )
    if measured.skipped:
        yield Finding(
            "skipped",
            f"{measured.skipped:,} of {measured.steps:,} steps were skipped: their loss or gradient is not finite, or"
            " their batch has no usable sample; the log has the reasons",
        )


def _slow(measured: Measured, plan: Plan) -> Iterator[Finding]:
    """Yield why the typical step is outside the planned range; nothing if waiting for data hides it."""
    time, seconds = plan.estimate, measured.typical
    if seconds < time.fast.seconds:
        yield Finding(
            "faster than possible",
            f"{seconds:.4f} s a step are less than the bound of {time.fast.seconds:.4f} s: the plan is not that of this"
            " run, or its figures of the chip are wrong",
        )
    if seconds <= time.slow.seconds or measured.data > WAITING:
        return
    over = f"{seconds:.4f} s a step are {seconds / time.slow.seconds:.2f}x the slow end"
    network, memory, compute = (part / time.serial for part in (time.network, time.memory, time.compute))
    reached = f"matrix products reach {time.compute / seconds:.0%} of the peak rate, recomputation included"
    if network > SENDING:
        yield Finding(
            "communication-bound",
            f"{over}; collectives take {network:.0%} of the plan at peak rates (more than {SENDING:.0%}): take more"
            " pairs per device, or smaller config.mesh.fsdp or tensor",
        )
    elif memory > compute:
        yield Finding(
            "HBM-bound",
            f"{over}; HBM takes {memory:.0%} of the plan at peak rates, compute {compute:.0%}: `tclip plan --explain`"
            " shows large arrays; bfloat16, remat and microbatches change the traffic",
        )
    else:
        yield Finding(
            "compute-bound",
            f"{over}; {reached}: trace a few steps (config.profile_steps) for the modules that take longest; small"
            " batches per device and float32 are the usual reasons",
        )


def _memory(measured: Measured, plan: Plan) -> Iterator[Finding]:
    planned = plan.facts.memory.total
    if measured.memory is not None and measured.memory > OCCUPYING * planned:
        yield Finding(
            "memory",
            f"a device used {measured.memory / _GIB:.2f} GiB, {measured.memory / planned:.2f}x the plan (more than"
            f" {OCCUPYING}x): evaluations and a second copy of the state are not in the plan, other programs neither",
        )


def against_json(run: RecordedRun, measured: Measured, plan: Plan, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the measured steps, the plan and the findings, in bytes, seconds and fractions."""
    rates = {"images_per_second": _rate(measured, plan), "mfu": _mfu(measured, plan)}
    return {
        "run": run.workdir,
        "devices": run.devices,
        "measured": dataclasses.asdict(measured) | rates,
        "planned": plan.to_json(),
        "findings": [each._asdict() for each in findings],
    }


def against_text(run: RecordedRun, measured: Measured, plan: Plan, findings: Sequence[Finding]) -> str:
    """Format the measured figures beside those of the plan, then the findings."""
    time, memory, peak = plan.estimate, plan.facts.memory.total / _GIB, plan.facts.peak / _GIB
    used = "not recorded" if measured.memory is None else f"{measured.memory / _GIB:.2f}"
    started = "not recorded" if measured.compile_seconds is None else f"{measured.compile_seconds:,.0f}"
    rows = [
        ("", "measured", "planned"),
        ("seconds per step", f"{measured.seconds:.4f}", f"{time.fast.seconds:.4f} to {time.slow.seconds:.4f}"),
        ("images/s", f"{_rate(measured, plan):,.0f}", between(plan, "images_per_second")),
        ("MFU", f"{_mfu(measured, plan):.0%}", f"{between(plan, 'mfu', scale=100)}%"),
        ("GiB per device", used, f"{memory:.2f}" + (f", {peak:.2f} live" if peak else "")),
        ("waiting for data", f"{measured.data:.1%}", f"at most {WAITING:.0%}"),
        ("saving checkpoints", f"{measured.checkpoint:.1%}", f"at most {SAVING:.0%}"),
        ("stalls", f"{measured.stalled:.1%}", f"at most {STALLING:.0%}"),
        ("steps that compiled", f"{measured.compiled:.1%}", f"at most {COMPILING:.0%}"),
        ("masked samples", f"{measured.masked:.2%}", f"at most {MASKING:.0%}"),
        ("skipped steps", f"{measured.skipped:,}", "0"),
        ("compile and restore, s", started, f"{plan.facts.seconds:,.0f} here" if plan.facts.seconds else ""),
    ]
    return "\n".join(
        [
            f"{run.workdir}: {measured.steps:,} steps, {measured.first:,} to {measured.last:,},"
            f" on {run.described_devices or 'devices that are not on record'};"
            f" planned for {plan.topology.name}, {plan.facts.how}",
            "",
            *aligned(rows),
            "",
            *(f"{each.rule}: {each.text}" for each in findings),
        ]
    )


def _rate(measured: Measured, plan: Plan) -> float:
    return plan.run.data.batch_size / measured.seconds


def _mfu(measured: Measured, plan: Plan) -> float:
    """MFU of the measured seconds, by the formula of the plan."""
    return plan.estimate.fast.mfu * plan.estimate.fast.seconds / measured.seconds
