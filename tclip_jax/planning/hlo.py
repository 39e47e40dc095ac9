"""Parse the text of a compiled XLA program: its instructions, their arrays, and how often each is executed.

The text is parsed because jaxlib returns HloModuleProto only as bytes, and no dependency of this package decodes them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
      dtype: XLA's name of the dtype, such as bf16, s8 or pred.
      dims: shape.
      on_chip: whether the array is in on-chip memory, not in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = 8 if self.dtype == "pred" else int(match[0]) if (match := _BITS.search(self.dtype)) else 0
        return -(-self.size * bits // 8)


class Instruction(NamedTuple):
    """An instruction of a computation.

    Attributes:
      name: its name.
      arrays: its results; a tuple has several.
      opcode: XLA's name of the operation.
      operands: names of the instructions that it takes as inputs.
      attributes: the rest of its line.
      is_root: whether its result is that of the computation.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """All computations by name, and the name of the entry computation."""

    entry: str
    computations: dict[str, Computation]


class Execution(NamedTuple):
    """A computation that a step executes: the entry, the body of a loop, or a computation they call.

    Attributes:
      computation: its name.
      times: how often a step executes it.
      is_async: whether it runs beside what calls it, as collectives on SparseCores do.
    """

    computation: str
    times: int
    is_async: bool = False


def parse_program(text: str) -> Program:
    """Parse the text that `compiled.as_text()` returns.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", dict[str, Instruction]()
    for line in text.splitlines():
        if (start := _INSTRUCTION.match(line)) is not None:
            current[start[2]] = _instruction(line[start.end() :], start[2], bool(start[1]))
        elif (header := _COMPUTATION.match(line)) is not None:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError("the text of the compiled program has no ENTRY computation")
    return Program(entry, computations)


def executions(program: Program) -> Iterator[Execution]:
    """Yield the computations that run as sequences of instructions, without those fused into one instruction."""
    pending = [Execution(program.entry, 1)]
    while pending:
        computation, times, is_async = execution = pending.pop()
        yield execution
        for each in program.computations[computation].values():
            if each.opcode == "while":
                trips = trip_count(program, each, program.computations[computation])
                pending.append(Execution(_attribute(each, "body"), times * trips, is_async))
            elif each.opcode in ("call", "call-start", "conditional"):
                beside = is_async or each.opcode == "call-start"
                pending += [Execution(name, times, beside) for name in called(each)]


def called(instruction: Instruction) -> list[str]:
    """List the computations that an instruction calls or fuses; all branches for a conditional."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += _NAME.findall(branches) or [name.strip() for name in branches.split(",")]
    return names


def trip_count(program: Program, loop: Instruction, computation: Computation) -> int:
    """Return how often the body of a loop runs.

    The count is XLA's own, or the difference of the constant bound and the constant start of the loop's counter.

    Raises:
      ValueError: the text has neither.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[_attribute(loop, "condition")]
    # If the comparison is fused, its operands are those of the fusion.
    root = next(each for each in condition.values() if each.is_root)
    bounds = [_constant(condition[name]) for name in root.operands if name in condition]
    limits = [bound for bound in bounds if bound is not None]
    indices = [
        int(match[1])
        for name in root.operands
        if name in condition and (match := re.search(r"index=(\d+)", condition[name].attributes))
    ]
    if len(limits) != 1 or len(indices) != 1:
        raise ValueError(f"the loop {loop.name} of the compiled program has no known bound")
    start = _tuple_element(computation, loop.operands[0], indices[0])
    return max(limits[0] - (start or 0), 0)


def _tuple_element(computation: Computation, name: str, index: int) -> int | None:
    """Return the constant start of a loop's counter, behind copies and tuples; None if the start is computed."""
    source = computation.get(name)
    if source is not None and source.opcode == "tuple":
        source = computation.get(source.operands[index])
    while source is not None and source.opcode == "copy":
        source = computation.get(source.operands[0])
    return None if source is None else _constant(source)


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant":
        return None
    match = re.match(r"\((-?\d+)\)", instruction.attributes)
    return int(match[1]) if match else None


def _attribute(instruction: Instruction, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not match:
        raise ValueError(f"{instruction.opcode} {instruction.name} of the compiled program has no {name}")
    return match[1]


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    """Parse the text after the equal sign: shape, opcode, operands in parentheses, attributes."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    arrays, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    operands = rest[len(opcode) : close]
    # The value of a constant and the number of a parameter are in the place of operands.
    attributes = rest[len(opcode) :] if opcode in ("constant", "parameter") else rest[close:]
    return Instruction(name, parse_arrays(arrays), opcode, tuple(_NAME.findall(operands)), attributes, is_root)


def parse_arrays(text: str) -> tuple[Array, ...]:
    """Parse the dtypes and shapes of an array or of a tuple of arrays."""
    return tuple(
        Array(dtype, tuple(map(int, dims.split(","))) if dims else (), space not in ("", "0", "5"))
        for dtype, dims, space in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in the compiled program: {text[:80]}")
