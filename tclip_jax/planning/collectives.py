"""Count the bytes that a compiled step moves, by collectives over the mesh and to and from HBM."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tclip_jax.planning.hlo import Array, Computation, Instruction, Program, called, executions
from tclip_jax.planning.kernels import Costs, KernelCost

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# XLA for TPUs writes a reduce-scatter as a fusion of this name around an all-reduce. It writes an asynchronous
# collective as copies in several fusions, of which the first contains the start.
_FUSED_SCATTER, _ASYNC_START = "all-reduce-scatter", "AsyncCollectiveStart"

Groups = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a step.

    Attributes:
      kind: one of `KINDS`.
      arrays: its results on one device; the operands of a reduce-scatter.
      axes: mesh axes over which it runs; () if its groups match none.
      devices: number of devices in a group.
      times: executions per step.
      name: JAX's name of the operation.
      is_async: whether its start and its end are two instructions, between which the device computes.
    """

    kind: str
    arrays: tuple[Array, ...]
    axes: tuple[str, ...]
    devices: int
    times: int
    name: str
    is_async: bool = False

    @property
    def dtype(self) -> str:
        """The dtype of the largest array."""
        return max(self.arrays, key=lambda array: array.bytes).dtype

    @property
    def bytes(self) -> int:
        """Bytes of the arrays, summed over the executions of a step."""
        return self.times * sum(array.bytes for array in self.arrays)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends per step in a ring of n: `bytes` · (n − 1) / n, doubled for an all-reduce."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dtype": self.dtype, "bytes": self.bytes, "sent_bytes": self.sent_bytes}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Collective:
        arrays = tuple(Array(array["dtype"], tuple(array["dims"]), array["on_chip"]) for array in fields["arrays"])
        names = ("kind", "devices", "times", "name", "is_async")
        return cls(arrays=arrays, axes=tuple(fields["axes"]), **{name: fields[name] for name in names})


def find_collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Return the collectives of a program between two or more devices, the largest first.

    Args:
      program: the compiled program.
      mesh: name of axis -> size.

    Raises:
      ValueError: a computation with collectives is called in a way that is not known here.
    """
    collectives = [_collective(*found, mesh) for found in _instructions(program)]
    return sorted((each for each in collectives if each.devices > 1), key=lambda each: -each.sent_bytes)


def carries_activations(
    collective: Collective,
    sizes: Collection[int],
    rows: int,
    least_rows: int,
    weights: Collection[tuple[int, ...]] = (),
) -> bool:
    """Return whether a collective carries a batch x sequence x width array.

    Args:
      collective: the collective.
      sizes: sequence · width of each such array in the models.
      rows: size of the global batch.
      least_rows: size of the smallest part of the batch that a device processes at once.
      weights: shapes of parameters, gradients and embeddings, sorted and without axes of size 1.
    """
    for array in collective.arrays:
        if tuple(sorted(size for size in array.dims if size > 1)) in weights:
            continue
        parts = [array.size // size for size in sizes if array.size % size == 0]
        if any(part >= max(least_rows, 2) and rows % part == 0 for part in parts):
            return True
    return False


def _instructions(program: Program) -> Iterator[tuple[Instruction, str, int, bool]]:
    """Yield collectives with their computation, their executions, and whether they are asynchronous.

    The copies of an asynchronous collective count once.
    """
    seen = set()
    for computation, times, beside in executions(program):
        pending = [(computation, beside)]
        while pending:
            name, inside = pending.pop()
            seen.add(name)
            instructions = program.computations[name]
            started = {
                operand
                for each in instructions.values()
                if f'"{_ASYNC_START}"' in each.attributes
                for operand in each.operands
            }
            for each in instructions.values():
                if each.opcode.removesuffix("-start") in KINDS:
                    if "chain_id=" not in each.attributes or each.name in started:
                        split = inside or each.opcode.endswith("-start") or each.name in started
                        yield each, name, times, split
                elif each.opcode in ("fusion", "async-start"):
                    pending += [(inner, inside or each.opcode == "async-start") for inner in called(each)]
    for name in program.computations.keys() - seen:
        for each in program.computations[name].values():
            if each.opcode.removesuffix("-start") in KINDS:
                raise ValueError(
                    f"the compiled program has {each.opcode} {each.name} in {name}, of which no call is known"
                )


def _collective(
    instruction: Instruction, computation: str, times: int, is_async: bool, mesh: Mapping[str, int]
) -> Collective:
    kind, arrays = instruction.opcode, instruction.arrays
    if kind.endswith("-start"):
        kind = kind.removesuffix("-start")
        if kind != "all-reduce":  # (operands, results, flags)
            arrays = tuple(array for array in arrays if array.dims)
            arrays = arrays[len(arrays) // 2 :]
    groups = _groups(instruction.attributes, mesh)
    devices = 2 if kind == "collective-permute" else groups.shape[1]
    if kind == "reduce-scatter":
        arrays = tuple(dataclasses.replace(each, dims=(devices, *each.dims)) for each in arrays)
    if computation.startswith(_FUSED_SCATTER):
        kind = "reduce-scatter"
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, arrays, _axes(groups, mesh), devices, times, name[1] if name else "", is_async)


def _groups(attributes: str, mesh: Mapping[str, int]) -> Groups:
    """Parse device ids, (groups, members), in each notation of XLA; a pair of a permutation is a group of two."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes)
    if listed:
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if counted:
        return _transposed(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return _named_groups(sizes, named[2], re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named[3]))
    return np.arange(math.prod(mesh.values()))[None]  # no groups: all devices


def _named_groups(sizes: Mapping[str, int], order: str, axes: Sequence[tuple[str, str, str]]) -> Groups:
    """Expand mesh['a'=2,'b'=8], device_ids=([4,4]T(1,0)) {'a','b':(2)4}: axis a, and 4 in each of 2 parts of b."""
    shape: list[int] = []
    inside: list[int] = []
    chosen = {name: (int(before or 1), int(part) if part else sizes[name]) for name, before, part in axes}
    for name, size in sizes.items():
        if name in chosen:
            before, part = chosen[name]
            inside.append(len(shape) + 1)
            shape += [before, part, size // before // part]
        else:
            shape.append(size)
    ids = np.arange(math.prod(shape))
    if counted := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        ids = _transposed(counted[1], counted[2])
    elif listed := re.search(r"device_ids=\(([\d,]+)\)", order):
        ids = np.array(_numbers(listed[1]))
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    members = math.prod(shape[axis] for axis in inside)
    return ids.reshape(shape).transpose(*outside, *inside).reshape(-1, members)


def _transposed(shape: str, order: str | None) -> Groups:
    """Expand [4,2]T(1,0): the ids 0 to 7 in the shape (4, 2), transposed by (1, 0)."""
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else range(len(sizes)))


def _numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ."""
    if groups.max() >= math.prod(mesh.values()):
        return ()
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    return tuple(name for name, along in zip(mesh, coordinates, strict=True) if (along != along[:, :1]).any())


# Instructions that move no bytes: they rename existing arrays, or contain instructions that are counted themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "conditional", "call", "call-start", "iota", "optimization-barrier"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATE = "dynamic-update-slice"


def memory_traffic(program: Program, kernels: Costs) -> int:
    """Return the bytes that a device reads from and writes to HBM per step.

    Args:
      program: the compiled program.
      kernels: the costs of its Pallas kernels.

    Raises:
      ValueError: the program calls a kernel without a cost.
    """
    return sum(
        times * _moved(program, each, program.computations[name], kernels)
        for name, times, _ in executions(program)
        for each in program.computations[name].values()
    )


def kernel_flops(program: Program, kernels: Costs) -> int:
    """Return the FLOPs of the Pallas kernels per step on a device; arguments and errors as of `memory_traffic`."""
    return sum(
        times * _kernel(each, kernels).flops
        for name, times, _ in executions(program)
        for each in program.computations[name].values()
        if _is_kernel(each)
    )


def _is_kernel(each: Instruction) -> bool:
    return each.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in each.attributes


def _kernel(each: Instruction, kernels: Costs) -> KernelCost:
    key = each.name.partition(".")[0], tuple(array.dims for array in each.arrays)
    if key not in kernels:
        raise ValueError(f"the compiled program calls a kernel {key[0]} with results {key[1]}, which has no known cost")
    return kernels[key]


def _moved(program: Program, each: Instruction, computation: Computation, kernels: Costs) -> int:
    """Return the bytes that one execution of an instruction reads and writes."""
    if each.opcode in _FREE or each.opcode.endswith("-done") or '"AllocateBuffer"' in each.attributes:
        return 0
    operands = [computation[name].arrays for name in each.operands if name in computation]
    if _is_kernel(each):
        cost = _kernel(each, kernels)
        arrays = zip((*operands, *((array,) for array in each.arrays)), cost.operands + cost.results, strict=True)
        return sum(size for (array,), size in arrays if not array.on_chip)
    if each.opcode == "copy-start":  # (to, from, context)
        return _bytes(each.arrays[:2])
    if each.opcode == "slice-start":  # ((from), to, context)
        return each.arrays[1].bytes + _bytes(each.arrays[1:2])
    if each.opcode in _SLICES:
        return _bytes(each.arrays) + _part(operands[0], each.arrays)
    if each.opcode == _UPDATE:
        return _bytes(operands[1]) + _part(each.arrays, operands[1])
    if each.opcode == "fusion":
        fused = program.computations[called(each)[0]]
        read = sum(_read(program, fused, i, arrays) for i, arrays in enumerate(operands))
        return read + _written(program, fused, each.arrays)
    return sum(map(_bytes, operands)) + _bytes(each.arrays)


def _read(program: Program, fused: Computation, index: int, arrays: tuple[Array, ...]) -> int:
    """Return the bytes that a fusion reads of one operand: the slices that it takes, or the whole operand."""
    whole = _bytes(arrays)
    if not whole:
        return 0
    parameter = next(e for e in fused.values() if e.opcode == "parameter" and e.attributes.startswith(f"({index})"))
    names, parts = [parameter.name], 0
    while names:
        name = names.pop()
        for user in fused.values():
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                inner = program.computations[called(user)[0]]
                parts += _read(program, inner, user.operands.index(name), arrays)
            elif user.opcode in _SLICES and user.operands[0] == name:
                parts += sum(array.bytes for array in user.arrays)
            elif not (user.opcode == "tuple" or (user.opcode == _UPDATE and user.operands[0] == name)):
                return whole
    return min(parts, whole)


def _written(program: Program, fused: Computation, arrays: tuple[Array, ...]) -> int:
    """Return the bytes that a fusion writes: the updated slices of its results, or the whole results."""
    root = next(each for each in fused.values() if each.is_root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = 0
    for result, array in zip(results, arrays, strict=False):
        while result.opcode == "bitcast" and result.operands[0] in fused:
            result = fused[result.operands[0]]
        if array.on_chip or result.opcode == "parameter":
            continue
        if result.opcode == "fusion":
            written += _written(program, program.computations[called(result)[0]], (array,))
        elif result.opcode == _UPDATE:
            written += sum(each.bytes for each in fused[result.operands[1]].arrays)
        else:
            written += array.bytes
    return written


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays if not array.on_chip)


def _part(whole: tuple[Array, ...], part: tuple[Array, ...]) -> int:
    """Return the bytes of a part of an array, or 0 if the array is on the chip."""
    return 0 if whole[0].on_chip else sum(array.bytes for array in part)
