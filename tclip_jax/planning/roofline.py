"""A roofline estimate of the step time: FLOPs, HBM traffic and sent bytes, each at the rate of the chip."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tclip_jax.planning.estimate import StepFacts
from tclip_jax.planning.hardware import NODE, Chip, Topology

# Fraction of the peak rate that the matrix products of a step are assumed to reach. Published training runs on TPUs
# reach 35 to 65 %: ViT-22B 54.9 % of v4 (arXiv 2302.05442), MaxText's models 35 to 50 % of v6e and 53 to 65 % of v5p
# (maxtext.readthedocs.io, "Optimized models tiering").
EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True)
class Speed:
    """A step time, and the figures of a run that follow from it.

    Attributes:
      seconds: time of a step.
      mfu: model FLOPs utilization: FLOPs without recomputation / (peak rate · `seconds`).
      images_per_second: throughput of all devices.
      hours, chip_hours: hours and chip-hours of all steps of the recipe.
      cost: cost of `chip_hours`; None without a price.
    """

    seconds: float
    mfu: float
    images_per_second: float
    hours: float
    chip_hours: float
    cost: float | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The time of a step in seconds, as a range.

    Attributes:
      compute: time of all matrix products at the peak rate, with recomputation.
      memory: time of the HBM traffic at the HBM bandwidth.
      network: time of the sent bytes at the bandwidth of the links.
      flops: FLOPs per device and step, with recomputation.
      efficiency: fraction of the peak rate that matrix products are assumed to reach at the slow end.
      fast: lower bound of the time: the maximum of compute, memory and network, if all of them overlap.
      slow: the larger of `serial` and compute / efficiency. A run may be slower.
    """

    compute: float
    memory: float
    network: float
    flops: float
    efficiency: float
    fast: Speed
    slow: Speed

    @property
    def serial(self) -> float:
        """Seconds of a step if nothing overlaps, at peak rates."""
        return self.compute + self.memory + self.network

    @property
    def bound_by(self) -> str:
        """What takes longest at peak rates: "compute", "HBM" or "network"."""
        times = {"compute": self.compute, "HBM": self.memory, "network": self.network}
        return max(times, key=lambda name: times[name])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"serial": self.serial, "bound_by": self.bound_by}


def estimate(
    facts: StepFacts,
    topology: Topology,
    *,
    batch: int,
    steps: int,
    pair_flops: float,
    model_flops: float,
    price: float | None = None,
    efficiency: float = EFFICIENCY,
    int8_flops: float = 0.0,
) -> Estimate:
    """Estimate the time of a step and of a run.

    Args:
      facts: memory, traffic and collectives of a step.
      topology: topology of a slice.
      batch: global batch size in image-text pairs.
      steps: number of steps of the run.
      pair_flops: FLOPs per pair with recomputation (`train_flops`).
      model_flops: FLOPs per pair without recomputation.
      price: price of a chip-hour, in any currency.
      efficiency: see `Estimate`.
      int8_flops: the part of `pair_flops` that is int8 products.
    """
    chip, devices = topology.chip, math.prod(facts.mesh.values())
    flops = batch * pair_flops / devices
    # The time that int8 products save, in operations of bfloat16.
    saved = batch * int8_flops / devices * (1 - 1 / chip.int8)
    compute, memory = (flops - saved) / chip.peak_flops, facts.traffic * chip.devices / chip.bandwidth
    network = sum(
        each.sent_bytes * chip.devices / link_bandwidth(chip, facts, each.axes, each.devices)
        for each in facts.collectives
    )

    def speed(seconds: float) -> Speed:
        hours = steps * seconds / 3600
        chip_hours = hours * (devices // chip.devices)
        mfu = batch * model_flops / devices / chip.peak_flops / seconds
        return Speed(seconds, mfu, batch / seconds, hours, chip_hours, None if price is None else price * chip_hours)

    fast, slow = max(compute, memory, network), max(compute + memory + network, compute / efficiency)
    return Estimate(compute, memory, network, flops, efficiency, speed(fast), speed(slow))


def link_bandwidth(chip: Chip, facts: StepFacts, axes: tuple[str, ...], devices: int) -> float:
    """Return the bytes/s that a chip can send in a ring collective.

    On a TPU the ring uses `facts.links`. A group of GPUs that fits into a node is assumed to be in one node and to use
    NVLink; a larger group uses the network.

    Args:
      chip: the chip.
      facts: facts of the step.
      axes: mesh axes of the collective.
      devices: number of devices in a group.
    """
    if chip.torus:
        return chip.link * max(facts.links.get("+".join(axes), 1), 1)
    return chip.link if devices <= NODE else chip.network


def assumptions(topology: Topology, facts: StepFacts) -> list[str]:
    """Return lines of text: the rates, their sources, and what the estimate omits."""
    chip = topology.chip
    int8 = f"; int8 {chip.int8:.0f} times that" if chip.int8 > 1 else ""
    fused = "; fused attention as its kernels compute it, with padding" if facts.kernel_flops else ""
    lines = [
        f"peak {chip.peak_flops * chip.devices / 1e12:,.0f} TFLOP/s (bfloat16{int8}), HBM"
        f" {chip.memory / 2**30:.1f} GiB at {chip.bandwidth / 1e9:,.0f} GB/s per chip: {chip.source}",
    ]
    if chip.torus:
        used = ", ".join(f"{axes or 'others'} {links}" for axes, links in sorted(facts.links.items()))
        lines.append(f"links of {chip.link / 1e9:.0f} GB/s each way; links used at once by collectives over {used}")
    else:
        lines.append(
            f"NVLink {chip.link / 1e9:.0f} GB/s each way among {NODE} GPUs; network {chip.network / 1e9:.0f} GB/s a GPU"
        )
    lines += [
        "FLOPs by formula: matrix products of three student forward passes (one more with remat, one more with"
        " microbatches) and one of the teacher; frozen parameters count as if they were trained" + fused,
        "HBM bytes from the compiled program: operands and results of each instruction that are in HBM"
        if facts.how == "compiled"
        else "memory, HBM bytes and collectives by formula, without compilation: within a factor of about 1.5",
        "collectives as rings; without latency, input pipeline, hosts, checkpoints and evaluation",
    ]
    return lines
