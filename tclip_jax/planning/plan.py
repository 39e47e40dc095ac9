"""A plan of a run on a topology: its memory, whether it fits, and the range of its time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from typing import Any

import jax
import ml_collections
from etils import epath

from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.inference.load import Architecture
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.flops import attention_flops, student_passes, train_flops
from tclip_jax.pages import aligned
from tclip_jax.parallel.sharding import path_of
from tclip_jax.planning.child import compiled_facts
from tclip_jax.planning.estimate import StepFacts, formula_facts
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.roofline import EFFICIENCY, Estimate, assumptions, estimate
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import RunConfig, run_config
from tclip_jax.training.build import teacher_params

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
            "accelerator_type": self.topology.accelerator_type,
            "chips": self.chips,
            "batch_size": self.run.data.batch_size,
            "remat": self.run.remat,
            "fits": self.fits,
            "device_memory": self.device_memory,
            "memory": dataclasses.asdict(memory) | {"total": memory.total},
            "pair_flops": self.pair_flops,
            "estimate": self.estimate.to_json(),
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
    efficiency: float = EFFICIENCY,
    cache: epath.PathLike | None = None,
) -> Plan:
    """Plan a run: compile its step in another process for TPUs, or estimate it by formula for GPUs.

    Args:
      config: the configuration of the run.
      topology: where the run is planned.
      teacher_preset: see `find_teacher`.
      price: price of a chip-hour, in any currency.
      efficiency: fraction of the peak rate that matrix products reach at the slow end of the estimate.
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
    pair_flops, int8_flops = _pair_flops(run, teacher if isinstance(teacher, Architecture) else None, facts)
    time = estimate(
        facts,
        topology,
        batch=run.data.batch_size,
        steps=run.steps,
        pair_flops=pair_flops,
        model_flops=train_flops(run.model, shape),
        price=price,
        efficiency=efficiency,
        int8_flops=int8_flops,
    )
    return Plan(run, topology, facts, time, pair_flops)


def _pair_flops(run: RunConfig, teacher: Architecture | None, facts: StepFacts) -> tuple[int, int]:
    """Return FLOPs per pair with recomputation, and those of them that are int8.

    Fused attention counts as its kernels compute it, with padding.
    """
    grad_cache = run.data.microbatches > 1
    again = 1 + (grad_cache and bool(run.loss.states))
    models = {"student": (run.model, student_passes(run.remat, grad_cache))}
    if teacher:
        models["teacher"] = teacher.config, again
    flops = train_flops(
        run.model, teacher and teacher.config, remat=run.remat, grad_cache=grad_cache, teacher_passes=again
    )
    for name, (implementation, _) in facts.attention.items():
        model, tower = name.split()
        config, passes = models[model]
        if implementation == "mosaic_tpu":
            flops -= passes * attention_flops(*config.towers[tower])
    flops += facts.kernel_flops * math.prod(facts.mesh.values()) // run.data.batch_size
    if not teacher:
        return flops, 0
    shapes = param_shapes(teacher.config, teacher.rules)
    params = jax.eval_shape(lambda params: teacher_params(params, teacher.rules, run), shapes)
    int8 = sum(
        2 * again * math.prod(leaf.shape) * teacher.config.towers[path_of(path).partition("/")[0]][1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path_of(path).endswith("/int8")
    )
    return flops, int8


def plan_text(plan: Plan) -> str:
    """Format a plan for a terminal: what it is, whether it fits and how long it takes, then tables."""
    facts, time, run = plan.facts, plan.estimate, plan.run
    devices = math.prod(facts.mesh.values())
    mesh = ", ".join(f"{name}={size}" for name, size in facts.mesh.items())
    batch, parts = run.data.batch_size, run.data.microbatches
    name = plan.topology.name + (f" ({plan.topology.accelerator_type})" if plan.topology.accelerator_type else "")
    per_device = f"{batch // devices:,} per device" + (f" in {parts:,} microbatches" if parts > 1 else "")
    how = f"compiled in {facts.seconds:.0f} s" if facts.how == "compiled" else "by formula"
    sent = sum(each.sent_bytes for each in facts.collectives)
    lines = [
        f"{name}: {plan.chips:,} chips, mesh {mesh}; batch {batch:,}, {per_device}; {how}",
        *_verdict_lines(plan),
        "",
        *_memory_lines(plan),
        "",
        *_collective_lines(facts),
        "",
        *_async_lines(facts),
        _moving_line(facts),
        *_attention_lines(facts),
        *_gather_lines(plan),
        "",
        *aligned(
            [
                ("a step at peak rates", "seconds"),
                (f"compute, {time.flops / 1e12:,.2f} TFLOP per device", f"{time.compute:.4f}"),
                (f"HBM, {facts.traffic / 1e9:,.1f} GB per device to and from", f"{time.memory:.4f}"),
                (f"network, {sent / 1e9:,.2f} GB per device", f"{time.network:.4f}"),
                ("if everything overlaps", f"{time.fast.seconds:.4f}"),
                ("if nothing overlaps", f"{time.serial:.4f}"),
            ]
        ),
        "",
        "assumed: " + "\n         ".join(assumptions(plan.topology, facts)),
    ]
    return "\n".join(lines)


def explain_text(plan: Plan) -> str:
    """Say what HBM contains when most of it is in use: a table of the largest arrays."""
    peak = plan.facts.at_peak
    if peak is None:
        return f"--explain needs a compiled plan: plans for {plan.topology.kind} are by formula"
    rows = [("MiB", "without padding", "array", "what it is")]
    for each in peak.arrays:
        shape = f"{each.array.dtype}[{','.join(map(str, each.array.dims))}]"
        name = each.name + (f"  ({each.source})" if each.source else "")
        rows.append((f"{each.bytes / _MIB:,.1f}", f"{each.array.bytes / _MIB:,.1f}", shape, name))
    shown = sum(each.bytes for each in peak.arrays)
    columns = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    lines = [
        f"HBM at its peak: {peak.total / _GIB:.3f} GiB = {peak.inputs / _GIB:.3f} of inputs +"
        f" {peak.temporaries / _GIB:.3f} of temporaries, which reserve {peak.allocated / _GIB:.3f} with fragmentation",
        f"during {peak.at}" + (f" ({peak.source})" if peak.source else ""),
        f"the largest {len(peak.arrays)} of {peak.count} arrays, {shown / peak.total:.0%} of it, on one device:",
    ]
    for size, content, shape, name in rows:
        lines.append(f"{size:>{columns[0]}}  {content:>{columns[1]}}  {shape:<{columns[2]}}  {name}")
    if abs(plan.facts.peak - peak.total) > 1e-3 * peak.total:
        line = f"the compiler's peak of live arrays is {plan.facts.peak / _GIB:.3f} GiB"
        if peak.on_chip > peak.temporaries:
            line += f": it counts {peak.on_chip / _GIB:.3f} GiB of on-chip memory in place of the temporaries"
        lines.append(line)
    return "\n".join(lines)


def _verdict_lines(plan: Plan) -> list[str]:
    """Say whether the run fits, and its speed, time and cost as ranges whose ends are explained."""
    time, chips = plan.estimate, plan.chips
    total, limit = plan.facts.memory.total, plan.device_memory
    slow, fast = time.slow, time.fast
    end = (
        f"matrix products at {time.efficiency:.0%} of the peak rate, an assumption that --efficiency changes"
        if slow.seconds > time.serial
        else f"peak rates, nothing overlaps: slower than matrix products at {time.efficiency:.0%} of the peak rate"
    )
    cost = "" if slow.cost is None else f", a cost of {between(plan, 'cost')}"
    return [
        f"{'fits' if plan.fits else 'does NOT fit'}: {total / _GIB:.2f} of {limit / _GIB:.1f} GiB per device,"
        f" {total / limit:.0%}",
        f"{between(plan, 'images_per_second')} images/s, {slow.images_per_second / chips:,.0f} to"
        f" {fast.images_per_second / chips:,.0f} per chip; {slow.mfu:.0%} to {fast.mfu:.0%} MFU",
        f"{plan.run.steps:,} steps: {between(plan, 'hours')} hours, {between(plan, 'chip_hours')} chip-hours{cost}",
        f"  slow end: {end}",
        f"  fast end: a bound that no run passes: peak rates, everything overlaps, {time.bound_by} takes longest",
    ]


def between(plan: Plan, field: str, separator: str = " to ", scale: float = 1.0) -> str:
    """Format a field of `Speed` as a range, the smaller number first; numbers below 10 have decimals."""
    ends = sorted(scale * getattr(speed, field) for speed in (plan.estimate.slow, plan.estimate.fast))
    return separator.join(f"{end:,.{(end < 10) + (end < 1)}f}" for end in ends)


def _memory_lines(plan: Plan) -> list[str]:
    memory = plan.facts.memory
    rows = [("memory per device", "GiB")]
    rows += [(name, f"{size / _GIB:.3f}") for name, size in dataclasses.asdict(memory).items() if size]
    rows.append(("total", f"{memory.total / _GIB:.3f}"))
    if plan.facts.peak:
        rows.append(("peak of live arrays", f"{plan.facts.peak / _GIB:.3f}"))
    return aligned(rows)


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


def _async_lines(facts: StepFacts) -> list[str]:
    """Say how much of the communication has a start and an end, between which the device computes."""
    if facts.how != "compiled" or not facts.collectives:
        return []
    pairs = [each for each in facts.collectives if each.is_async]
    (count, sent), (all_count, all_sent) = (
        (sum(each.times for each in some), sum(each.sent_bytes for each in some) / _MIB)
        for some in (pairs, facts.collectives)
    )
    return [
        f"asynchronous: {count:,} of {all_count:,} collectives, {sent:,.1f} of {all_sent:,.1f} MiB sent; computation"
        " can overlap these alone"
    ]


def _moving_line(facts: StepFacts) -> str:
    if facts.how != "compiled":
        return "plans by formula do not detect collectives that carry a batch x sequence x width array"
    moving = facts.moving_activations
    if not moving:
        return "no collective carries a batch x sequence x width array"
    return f"{len(moving)} collectives carry batch x sequence x width arrays:\n  " + "\n  ".join(moving[:5])


def _attention_lines(facts: StepFacts) -> list[str]:
    """Say which implementation of the attention each tower has; the reason only of those that are not fused."""
    towers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for tower, (implementation, reason) in facts.attention.items():
        towers[implementation, f" ({reason})" if implementation == "reference" else ""].append(tower)
    return [f"attention: {name}{reason} in {', '.join(where)}" for (name, reason), where in towers.items()]


def _gather_lines(plan: Plan) -> list[str]:
    gather = plan.quantized_gather
    if gather is None:
        return []
    size, as_bfloat16 = gather
    return [f"weights gathered as trits: {size / _MIB:,.1f} MiB, {size / as_bfloat16:.2f} of their size in bfloat16"]
