"""How long a step takes at best: what must be computed, moved to and from memory, and sent, each at the chip's rate."""

from __future__ import annotations

import dataclasses
import math

from tclip_jax.planning.estimate import StepFacts
from tclip_jax.planning.hardware import NODE, Chip, Topology


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, if each of the three alone took time, and what follows for a recipe.

    Attributes:
      compute: all products at the peak rate, with those that are recomputed.
      memory: all bytes to and from HBM at its bandwidth.
      network: all bytes that are sent at the bandwidth of the links.
      overlapped: the longest of the three: nothing waits for anything else.
      serial: their sum: nothing overlaps.
      flops: of a device a step, with those that are recomputed.
      mfu: at most: FLOPs of the model, without those that are recomputed, over what the peak allows in `overlapped`.
      images_per_second: of all devices, in `overlapped`.
      hours, chip_hours: of the whole recipe, in `overlapped`.
      serial_hours: in `serial`.
      cost: of `chip_hours` at the given price; None without one.
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
    """The roofline of a step.

    Args:
      batch: pairs of image and text over all devices.
      steps: of the recipe.
      pair_flops: per pair, with those that are recomputed (`train_flops`).
      model_flops: per pair, without them.
      price: of a chip and hour, in any currency.
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
    """Bytes/s that a chip can send in a ring over so many devices along these axes of the mesh.

    In a torus all links of the dimensions along which they lie are used. GPUs use NVLink within a node, where a group
    of devices is assumed to lie if it fits into one, else the network.
    """
    if chip.torus:
        return chip.link * max(facts.links.get("+".join(axes), 1), 1)
    return chip.link if devices <= NODE else chip.network


def assumptions(topology: Topology, facts: StepFacts) -> list[str]:
    """Lines for people: the rates, where they are from, and what is not counted."""
    chip = topology.chip
    lines = [
        f"peak {chip.peak_flops * chip.devices / 1e12:,.0f} TFLOP/s (bfloat16), HBM {chip.memory / 2**30:.1f} GiB at"
        f" {chip.bandwidth / 1e9:,.0f} GB/s a chip: {chip.source}",
    ]
    if chip.torus:
        used = ", ".join(f"{axes or 'others'} {links}" for axes, links in sorted(facts.links.items()))
        lines.append(f"links of {chip.link / 1e9:.0f} GB/s each way, used at once by collectives over {used}")
    else:
        lines.append(
            f"NVLink {chip.link / 1e9:.0f} GB/s each way among {NODE} GPUs, {chip.network / 1e9:.0f} GB/s a GPU beyond"
        )
    lines += [
        "FLOPs by formula: matrix products, three times the forward pass, once more with remat; the teacher's once",
        "HBM bytes from the compiled program: operands and results of each instruction that are not on the chip"
        if facts.how == "compiled"
        else "memory, HBM bytes and collectives by formula, nothing was compiled: within a factor of about 1.5",
        "collectives as rings; no latency, no waiting for data, hosts, checkpoints or evaluation",
    ]
    return lines
