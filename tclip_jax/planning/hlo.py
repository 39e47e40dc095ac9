"""Reads the text of a compiled XLA program: what it executes, how often, and which bytes that touches.

Not its HloModuleProto: jaxlib gives that as bytes alone, and no package that this one depends on can decode them.
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
    """One array of a program: `dtype` in XLA's words (bf16, s8, pred), `on_chip` if it is not in the main memory."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = 8 if self.dtype == "pred" else int(found[0]) if (found := _BITS.search(self.dtype)) else 0
        return -(-self.size * bits // 8)


class Instruction(NamedTuple):
    """`arrays` are its results, `operands` the names of what it takes, `attributes` the rest of its line."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """All computations by name, and the one that is executed."""

    entry: str
    computations: dict[str, Computation]


class Execution(NamedTuple):
    """A computation that is executed `times` a step: the entry, the body of a loop, or what they call."""

    computation: str
    times: int


def parse_program(text: str) -> Program:
    """The program of `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry.
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
    """What is executed as a sequence of instructions; what is fused into one of them is not."""
    waiting = [Execution(program.entry, 1)]
    while waiting:
        computation, times = execution = waiting.pop()
        yield execution
        for each in program.computations[computation].values():
            if each.opcode == "while":
                trips = trip_count(program, each, program.computations[computation])
                waiting.append(Execution(_attribute(each, "body"), times * trips))
            elif each.opcode in ("call", "conditional"):
                waiting += [Execution(name, times) for name in called(each)]


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction calls or fuses; of a conditional all branches."""
    names = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        names += _NAME.findall(branches) or [name.strip() for name in branches.split(",")]
    return names


def trip_count(program: Program, loop: Instruction, computation: Computation) -> int:
    """How often the body of a loop runs: XLA's own count, or the bound that a counter from a constant is compared with.

    Raises:
      ValueError: neither is there.
    """
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[_attribute(loop, "condition")]
    # The comparison may be fused; then its operands are the fusion's.
    root = next(each for each in condition.values() if each.is_root)
    bounds = [_constant(condition[name]) for name in root.operands if name in condition]
    limits = [bound for bound in bounds if bound is not None]
    indices = [
        int(found[1])
        for name in root.operands
        if name in condition and (found := re.search(r"index=(\d+)", condition[name].attributes))
    ]
    if len(limits) != 1 or len(indices) != 1:
        raise ValueError(f"the loop {loop.name} of the compiled program has no bound that is known")
    start = _tuple_element(computation, loop.operands[0], indices[0])
    return max(limits[0] - (start or 0), 0)


def _tuple_element(computation: Computation, name: str, index: int) -> int | None:
    """The constant that goes into a loop's counter, through copies and tuples; None if it is computed."""
    made = computation.get(name)
    if made is not None and made.opcode == "tuple":
        made = computation.get(made.operands[index])
    while made is not None and made.opcode == "copy":
        made = computation.get(made.operands[0])
    return None if made is None else _constant(made)


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode != "constant":
        return None
    found = re.match(r"\((-?\d+)\)", instruction.attributes)
    return int(found[1]) if found else None


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", instruction.attributes)
    if not found:
        raise ValueError(f"{instruction.opcode} {instruction.name} of the compiled program has no {name}")
    return found[1]


def _instruction(text: str, name: str, is_root: bool) -> Instruction:
    """From what follows the equal sign: shape, opcode, operands in parentheses, attributes."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    arrays, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode))
    operands = rest[len(opcode) : close]
    # The value of a constant and the number of a parameter stand where operands do.
    attributes = rest[len(opcode) :] if opcode in ("constant", "parameter") else rest[close:]
    return Instruction(name, _arrays(arrays), opcode, tuple(_NAME.findall(operands)), attributes, is_root)


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(dtype, tuple(map(int, dims.split(","))) if dims else (), space not in ("", "0", "5"))
        for dtype, dims, space in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """One past the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in the compiled program: {text[:80]}")
