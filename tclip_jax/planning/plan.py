"""A plan of a run on a topology: its memory, whether it fits, and a lower bound of its time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from typing import Any

import ml_collections
from etils import epath

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.models.flops import train_flops
from tclip_jax.pages import aligned
from tclip_jax.planning.child import compiled_facts
from tclip_jax.planning.estimate import StepFacts, formula_facts
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.roofline import Estimate, assumptions, estimate
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import RunConfig, run_config

_MIB, _GIB = 2**20, 2**30
# dtype of gathered trits -> trits per element: one in an int8, four in a packed byte.
_TRITS = {"s8": 1, "s2": 1, "u2": 1, "u8": 4}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology.

    Attributes:
      run: the run.
      topology: the topology of one slice.
      facts: memory, traffic and collectives of a step.
      estimate: roofline estimate of a step.
      pair_flops: FLOPs of training per image-text pair, with recomputation.
    """

    run: RunConfig
    topology: Topology
    facts: StepFacts
    estimate: Estimate
    pair_flops: int

    @property
    def device_memory(self) -> float:
        """HBM of a JAX device in bytes."""
        return self.topology.chip.memory / self.topology.chip.devices

    @property
    def fits(self) -> bool:
        return self.facts.memory.total <= self.device_memory

    @property
    def chips(self) -> int:
        """Number of chips of all slices."""
        return math.prod(self.facts.mesh.values()) // self.topology.chip.devices

    @property
    def quantized_gather(self) -> tuple[int, int] | None:
        """Bytes of weights gathered as trits per step, and of these weights in bfloat16; None without such weights."""
        gathers = [
            each
            for each in self.facts.collectives
            if each.kind == "all-gather" and each.dtype in _TRITS and "fsdp" in each.axes
        ]
        if not gathers:
            return None
        as_bfloat16 = sum(
            2 * _TRITS[array.dtype] * array.size * each.times
            for each in gathers
            for array in each.arrays
            if array.dtype in _TRITS
        )
        return sum(each.bytes for each in gathers), as_bfloat16

    def to_json(self) -> dict[str, Any]:
        """Return all figures, in bytes, seconds and fractions."""
        memory, gather = self.facts.memory, self.quantized_gather
        return {
            "topology": self.topology.name,
            "chips": self.chips,
            "batch_size": self.run.data.batch_size,
            "remat": self.run.remat,
            "fits": self.fits,
            "device_memory": self.device_memory,
            "memory": dataclasses.asdict(memory) | {"total": memory.total},
            "pair_flops": self.pair_flops,
            "estimate": dataclasses.asdict(self.estimate),
            "quantized_gather": gather and {"bytes": gather[0], "bfloat16": gather[1]},
            "assumptions": assumptions(self.topology, self.facts),
            **{name: value for name, value in self.facts.to_json().items() if name != "memory"},
        }


def make_plan(
    config: ml_collections.ConfigDict,
    topology: Topology,
    *,
    teacher_preset: str = "",
    price: float | None = None,
    cache: epath.PathLike | None = None,
) -> Plan:
    """Plan a run: compile its step in another process for TPUs, or estimate it by formula for GPUs.

    Args:
      config: the configuration of the run.
      topology: where the run is planned.
      teacher_preset: see `find_teacher`.
      price: price of a chip-hour, in any currency.
      cache: folder of compiled results; None for no cache.

    Raises:
      ValueError: the configuration is invalid or does not fit the topology, or libtpu is missing.
    """
    run = run_config(config)
    teacher = find_teacher(run, teacher_preset)
    if topology.is_gpu:
        facts = formula_facts(run, topology, teacher_preset)
    else:
        facts = compiled_facts(json.loads(config.to_json()), topology.name, teacher_preset, cache)
    shape = None if teacher is None or isinstance(teacher, TeacherCache) else teacher.config
    pair_flops = train_flops(run.model, shape, remat=run.remat)
    time = estimate(
        facts,
        topology,
        batch=run.data.batch_size,
        steps=run.steps,
        pair_flops=pair_flops,
        model_flops=train_flops(run.model, shape),
        price=price,
    )
    return Plan(run, topology, facts, time, pair_flops)


def plan_text(plan: Plan) -> str:
    """Format a plan as tables for a terminal."""
    facts, time, chips = plan.facts, plan.estimate, plan.chips
    devices = math.prod(facts.mesh.values())
    mesh = ", ".join(f"{name}={size}" for name, size in facts.mesh.items())
    batch = plan.run.data.batch_size
    sent = sum(each.sent_bytes for each in facts.collectives)
    how = f"compiled in {facts.seconds:.0f} s" if facts.how == "compiled" else "by formula"
    lines = [
        f"{plan.topology.name}: {chips:,} chips, mesh {mesh}; batch {batch:,}, {batch // devices:,} per device; {how}",
        "",
        *_memory_lines(plan),
        "",
        *_collective_lines(facts),
        "",
        _moving_line(facts),
        *_gather_lines(plan),
        "",
        *aligned(
            [
                ("lower bounds of a step", "seconds"),
                (f"compute, {time.flops / 1e12:,.2f} TFLOP per device", f"{time.compute:.4f}"),
                (f"memory, {facts.traffic / 1e9:,.1f} GB per device to and from HBM", f"{time.memory:.4f}"),
                (
                    f"network, {sent / 1e9:,.2f} GB per device",
                    f"{time.network:.4f}",
                ),
                ("if everything overlaps", f"{time.overlapped:.4f}"),
                ("if nothing overlaps", f"{time.serial:.4f}"),
            ]
        ),
        "",
        f"at most {time.images_per_second:,.0f} images/s, {time.images_per_second / chips:,.0f} per chip,"
        f" {time.mfu:.0%} MFU",
        f"{plan.run.steps:,} steps: {time.hours:,.1f} to {time.serial_hours:,.1f} hours, at least"
        f" {time.chip_hours:,.0f} chip-hours" + ("" if time.cost is None else f", a cost of {time.cost:,.0f}"),
        "",
        "assumed: " + "\n         ".join(assumptions(plan.topology, facts)),
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    memory, limit = plan.facts.memory, plan.device_memory
    rows = [("per device", "GiB")]
    rows += [(name, f"{size / _GIB:.3f}") for name, size in dataclasses.asdict(memory).items() if size]
    rows.append(("total", f"{memory.total / _GIB:.3f}"))
    verdict = "fits" if plan.fits else "does NOT fit"
    peak = f"; peak {plan.facts.peak / _GIB:.3f} GiB" if plan.facts.peak else ""
    return [*aligned(rows), f"{verdict}: {memory.total / limit:.0%} of {limit / _GIB:.1f} GiB{peak}"]


def _collective_lines(facts: StepFacts) -> list[str]:
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0])
    for each in facts.collectives:
        total = totals[each.kind, each.dtype, "+".join(each.axes) or "other"]
        for i, value in enumerate((each.times, each.bytes / _MIB, each.sent_bytes / _MIB)):
            total[i] += value
    rows = [("collectives per step", "over", "dtype", "count", "MiB", "sent MiB")]
    rows += [
        (kind, axes, dtype, f"{total[0]:,.0f}", f"{total[1]:,.1f}", f"{total[2]:,.1f}")
        for (kind, dtype, axes), total in sorted(totals.items(), key=lambda item: -item[1][2])
    ]
    return aligned(rows)


def _moving_line(facts: StepFacts) -> str:
    if facts.how != "compiled":
        return "plans by formula do not detect collectives that carry a batch x sequence x width array"
    moving = facts.moving_activations
    if not moving:
        return "no collective carries a batch x sequence x width array"
    return f"{len(moving)} collectives carry batch x sequence x width arrays:\n  " + "\n  ".join(moving[:5])


def _gather_lines(plan: Plan) -> list[str]:
    gather = plan.quantized_gather
    if gather is None:
        return []
    size, as_bfloat16 = gather
    return [f"weights gathered as trits: {size / _MIB:,.1f} MiB, {size / as_bfloat16:.2f} of their size in bfloat16"]
