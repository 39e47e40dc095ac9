"""Chips, with the figures of their data sheets, and the topologies that a run can be planned for."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from tclip_jax.models.flops import PEAK_FLOPS

MOST_CHIPS = 4096
_SHEETS = "https://cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip and its interconnect.

    Attributes:
      device_kind: JAX's name of the device, a key of `PEAK_FLOPS`.
      memory: HBM in bytes.
      bandwidth: HBM bandwidth in bytes/s.
      link: bandwidth of one link in one direction, bytes/s: to a neighbour in the torus for TPUs, within the node for
        GPUs.
      source: URL of the data sheet.
      network: bandwidth to other nodes in one direction, bytes/s per GPU; 0 for TPUs.
      torus: number of dimensions of the torus; 0 for GPUs.
      ring: a dimension of a slice closes to a ring if its size is a multiple of `ring`; 0 for GPUs.
      devices: number of JAX devices per chip.
      type: Google Cloud's name of the type, as in the accelerator type "v5litepod-16"; "" for GPUs.
      int8: peak rate of int8 products, relative to bfloat16; 1 if the chip has no faster ones.
      cores: what a chip adds to the number in an accelerator type: its TensorCores, or 1 if the number counts chips.
    """

    device_kind: str
    memory: float
    bandwidth: float
    link: float
    source: str
    network: float = 0.0
    torus: int = 0
    ring: int = 0
    devices: int = 1
    type: str = ""
    cores: int = 1
    int8: float = 1.0

    @property
    def peak_flops(self) -> float:
        """Peak of dense bfloat16 FLOP/s of one device."""
        return PEAK_FLOPS[self.device_kind]


# The bandwidth of a TPU link is the "inter-chip interconnect bandwidth" / ports: 4 in a 2D torus, 6 in a 3D torus.
TPUS = {
    "v4": Chip("TPU v4", 32 * 2**30, 1228e9, 50e9, f"{_SHEETS}/v4", torus=3, ring=4, type="v4", cores=2),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 50e9, f"{_SHEETS}/v5e", torus=2, ring=16, type="v5litepod", int8=2),
    "v5p": Chip("TPU v5", 95 * 10**9, 2765e9, 100e9, f"{_SHEETS}/v5p", torus=3, ring=4, type="v5p", cores=2, int8=2),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1640e9, 100e9, f"{_SHEETS}/v6e", torus=2, ring=16, type="v6e", int8=2),
    "tpu7x": Chip(
        *("TPU7x", 192 * 2**30, 7370e9, 200e9, f"{_SHEETS}/tpu7x"), torus=3, ring=4, devices=2, type="tpu7x", cores=2
    ),
}
NODE = 8  # GPUs connected by NVLink
GPUS = {
    "a100": Chip("NVIDIA A100", 80e9, 2039e9, 300e9, "https://www.nvidia.com/en-us/data-center/a100", 25e9, int8=2),
    "h100": Chip("NVIDIA H100", 80e9, 3350e9, 450e9, "https://www.nvidia.com/en-us/data-center/h100", 50e9, int8=2),
    "h200": Chip("NVIDIA H200", 141e9, 4800e9, 450e9, "https://www.nvidia.com/en-us/data-center/h200", 50e9, int8=2),
}
_POD = 256  # chips of the largest slice of a 2D torus that Google Cloud offers
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs or a number of GPUs.

    Attributes:
      kind: key of `TPUS` or `GPUS`.
      shape: number of chips along each dimension of the torus; (number of GPUs,) for GPUs.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return (TPUS | GPUS)[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices; a device of TPU7x is half a chip."""
        return self.chips * self.chip.devices

    @property
    def accelerator_type(self) -> str:
        """Google Cloud's name of this slice, such as "v5litepod-16"; "" for GPUs, or if it means another shape."""
        name = f"{self.chip.type}-{self.chips * self.chip.cores}"
        return name if not self.is_gpu and _slice_shape(self.kind, self.chips) == self.shape else ""

    @property
    def is_gpu(self) -> bool:
        return self.kind in GPUS


def parse_topology(name: str) -> Topology:
    """Parse the name of a topology, or of accelerators as `tclip launch` takes them.

    Args:
      name: "v5e:16x16" or "h100:64"; "v5litepod-256" or "v4-32" (Google Cloud); "tpu-v6e-16" or "H100:8" (SkyPilot).

    Raises:
      ValueError: there is no such topology; the message lists all.
    """
    lowered = name.lower().removeprefix("tpu-").replace("a100-80gb:", "a100:")
    kind, _, text = lowered.partition(":")
    numbers = text.split("x")
    shape = tuple(int(number) for number in numbers if number.isascii() and number.isdigit())
    if len(shape) == len(numbers) and (
        (kind in GPUS and len(shape) == 1 and 1 <= shape[0] <= MOST_CHIPS)
        or (kind in TPUS and shape in _slice_shapes(kind))
    ):
        return Topology(kind, shape)
    if topology := _parse_accelerator_type(lowered):
        return topology
    raise ValueError(f"there is no topology {name!r}: {_choices(re.split('[:-]', lowered)[0])}")


def recorded_topology(devices: Mapping[str, Any]) -> Topology | None:
    """Return the topology of the devices that a run has recorded (`parallel.mesh.device_record`).

    Returns:
      One slice; None if there are no figures for these devices.
    """
    of_kind = [name for name, chip in (TPUS | GPUS).items() if _is_kind(devices["kind"], chip)]
    if not of_kind:
        return None
    kind = of_kind[0]
    if kind in GPUS:
        return Topology(kind, (devices["count"],)) if devices["count"] <= MOST_CHIPS else None
    shape = tuple(devices["shape"][: TPUS[kind].torus])
    # The runtime may number the axes of a slice in another order.
    return next((Topology(kind, each) for each in _slice_shapes(kind) if sorted(each) == sorted(shape)), None)


def _is_kind(device_kind: str, chip: Chip) -> bool:
    """Return whether JAX's name of a device is that of a chip, or another name of it."""
    others = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}
    name = others.get(device_kind, device_kind)
    return name == chip.device_kind or (
        name.startswith("NVIDIA") and name.startswith((f"{chip.device_kind} ", f"{chip.device_kind}-"))
    )


def _choices(kind: str) -> str:
    """Return the names of topologies of the nearest kind of chip, or of all kinds if none is near, for an error."""
    types = {chip.type: each for each, chip in TPUS.items()}
    near = difflib.get_close_matches(kind, [*TPUS, *GPUS, *types], 1)
    kind = types.get(near[0], near[0]) if near else ""
    if kind in GPUS:
        return f"write {kind}:N for N GPUs, 1 to {MOST_CHIPS:,}, such as {kind}:64"
    flat, small = (", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (_FLAT, _SMALL))
    cubes = f"{small}, or three of 4, 8, 12 and 16 with at most {MOST_CHIPS:,} chips, such as 8x8x16"
    if kind in TPUS:
        chip = TPUS[kind]
        named = f"{chip.type}-{16 * chip.cores} for 16 chips" + (" of 2 TensorCores" if chip.cores > 1 else "")
        return f"write {named}, or {kind}: with a shape: {flat if chip.torus == 2 else cubes}"
    return (
        f"choose from v5e, v6e: {flat}; v4, v5p, tpu7x: {cubes}; {', '.join(GPUS)}: a number, such as h100:64;"
        " or an accelerator type: v5litepod-16, v6e-16 (16 chips), v4-32, v5p-32, tpu7x-32 (16 chips of 2 TensorCores)"
    )


def _parse_accelerator_type(name: str) -> Topology | None:
    """Return the slice that an accelerator type of Google Cloud means, such as "v4-32", or None."""
    version, _, text = name.partition("-")
    for kind, chip in TPUS.items():
        if version in (kind, chip.type) and text.isascii() and text.isdigit() and int(text) % chip.cores == 0:
            shape = _slice_shape(kind, int(text) // chip.cores)
            return Topology(kind, shape) if shape else None
    return None


def _slice_shape(kind: str, chips: int) -> tuple[int, ...] | None:
    """Return the shape of a slice if only its number of chips is given: the one nearest to a square or cube."""
    if TPUS[kind].torus == 2 and chips > _POD:
        return None
    shapes = (shape for shape in _slice_shapes(kind) if math.prod(shape) == chips)
    # Sizes ascend, except in the smallest slice.
    return min((shape for shape in shapes if list(shape) == sorted(shape) or shape == _SMALL[0]), key=sum, default=None)


def _slice_shapes(kind: str) -> list[tuple[int, ...]]:
    """List the shapes of slices that can be planned for."""
    if TPUS[kind].torus == 2:
        return list(_FLAT)
    cubes = itertools.product((4, 8, 12, 16), repeat=3)
    return [*_SMALL, *(shape for shape in cubes if math.prod(shape) <= MOST_CHIPS)]
