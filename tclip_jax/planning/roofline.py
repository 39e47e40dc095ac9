"""A roofline estimate of the step time: FLOPs, HBM traffic and sent bytes, each at the rate of the chip."""

from __future__ import annotations

import dataclasses
import math

from tclip_jax.planning.estimate import StepFacts
from tclip_jax.planning.hardware import NODE, Chip, Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Lower bounds of the step time in seconds, and the figures of a run that follow from them.

    Attributes:
      compute: time of all matrix products at the peak rate, with recomputation.
      memory: time of the HBM traffic at the HBM bandwidth.
      network: time of the sent bytes at the bandwidth of the links.
      overlapped: the maximum of the three, if all of them overlap.
      serial: the sum of the three, if none of them overlap.
      flops: FLOPs per device and step, with recomputation.
      mfu: upper bound of the model FLOPs utilization: FLOPs without recomputation / (peak rate · `overlapped`).
      images_per_second: throughput of all devices at `overlapped`.
      hours, chip_hours: hours and chip-hours of all steps of the recipe at `overlapped`.
      serial_hours: hours of all steps at `serial`.
      cost: cost of `chip_hours`; None without a price.
    """

    compute: float
    memory: float
    network: float
    overlapped: float
    serial: float
    flops: float
    mfu: float
    images_per_second: float
    hours: float
    chip_hours: float
    serial_hours: float
    cost: float | None


def estimate(
    facts: StepFacts,
    topology: Topology,
    *,
    batch: int,
    steps: int,
    pair_flops: float,
    model_flops: float,
    price: float | None = None,
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
    """
    chip, devices = topology.chip, math.prod(facts.mesh.values())
    flops = batch * pair_flops / devices
    compute, memory = flops / chip.peak_flops, facts.traffic * chip.devices / chip.bandwidth
    network = sum(
        each.sent_bytes * chip.devices / link_bandwidth(chip, facts, each.axes, each.devices)
        for each in facts.collectives
    )
    overlapped, serial = max(compute, memory, network), compute + memory + network
    hours, chips = steps * overlapped / 3600, devices // chip.devices
    return Estimate(
        compute=compute,
        memory=memory,
        network=network,
        overlapped=overlapped,
        serial=serial,
        flops=flops,
        mfu=batch * model_flops / devices / chip.peak_flops / overlapped,
        images_per_second=batch / overlapped,
        hours=hours,
        chip_hours=hours * chips,
        serial_hours=steps * serial / 3600,
        cost=None if price is None else price * hours * chips,
    )


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
    lines = [
        f"peak {chip.peak_flops * chip.devices / 1e12:,.0f} TFLOP/s (bfloat16), HBM {chip.memory / 2**30:.1f} GiB at"
        f" {chip.bandwidth / 1e9:,.0f} GB/s per chip: {chip.source}",
    ]
    if chip.torus:
        used = ", ".join(f"{axes or 'others'} {links}" for axes, links in sorted(facts.links.items()))
        lines.append(f"links of {chip.link / 1e9:.0f} GB/s each way; links used at once by collectives over {used}")
    else:
        lines.append(
            f"NVLink {chip.link / 1e9:.0f} GB/s each way among {NODE} GPUs; network {chip.network / 1e9:.0f} GB/s a GPU"
        )
    lines += [
        "FLOPs by formula: matrix products of three student forward passes (four with remat) and one of the teacher",
        "HBM bytes from the compiled program: operands and results of each instruction that are in HBM"
        if facts.how == "compiled"
        else "memory, HBM bytes and collectives by formula, without compilation: within a factor of about 1.5",
        "collectives as rings; without latency, input pipeline, hosts, checkpoints and evaluation",
    ]
    return lines
