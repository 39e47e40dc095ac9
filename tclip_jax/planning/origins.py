"""The names in our code of the arrays of a compiled program: paths of inputs, scopes of operations, source lines."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from tclip_jax.planning.hlo import Instruction, Program, called

_PACKAGE = pathlib.Path(__file__).resolve().parents[1].name
_TABLE = re.compile(r"(FileNames|FunctionNames|FileLocations|StackFrames)$")
_ENTRY = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})$')
_NUMBERS = re.compile(r"(\w+)=(\d+)")


class Origin(NamedTuple):
    """Where an array comes from.

    Attributes:
      name: path of a parameter ("state/params/clip/text/…") or JAX's name of the operation, with its scopes.
      source: the innermost line of this package, as "ternary/sums.py:57"; "" if the program does not have it.
    """

    name: str
    source: str = ""


class Origins:
    """Finds the origins of the results of instructions.

    Args:
      program: the compiled program.
      text: its text, whose tables have the source lines.
    """

    def __init__(self, program: Program, text: str) -> None:
        self._program, self._lines = program, source_lines(text)
        self._of = {each.name: (each, name) for name, body in program.computations.items() for each in body.values()}
        self._callers = {
            name: each
            for body in program.computations.values()
            for each in body.values()
            for name in (*called(each), *re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", each.attributes))
        }

    def is_input(self, name: str) -> bool:
        """Return whether an instruction is a parameter of the program."""
        each, computation = self._of.get(name, (None, ""))
        return each is not None and each.opcode == "parameter" and computation == self._program.entry

    def find(self, name: str, index: tuple[int, ...] = ()) -> Origin:
        """Return the origin of a result of an instruction: `index` selects an element of a tuple.

        Copies lead to what they copy, loops to the operation in their body, and updated slices to what they store.
        """
        return self._find(name, index, frozenset()) or Origin(name)

    def _find(self, name: str, index: tuple[int, ...], seen: frozenset[tuple[str, tuple[int, ...]]]) -> Origin | None:
        if name not in self._of or (name, index) in seen:
            return None
        each, computation = self._of[name]
        seen |= {(name, index)}
        for source, part in self._sources(each, computation, index):
            if origin := self._find(source, part, seen):
                return origin
        return self._stated(each)

    def _sources(
        self, each: Instruction, computation: str, index: tuple[int, ...]
    ) -> list[tuple[str, tuple[int, ...]]]:
        """Return the results that name this result, the best first."""
        if each.opcode == "get-tuple-element":
            element = re.search(r"index=(\d+)", each.attributes)
            return [(each.operands[0], (int(element[1]), *index))] if element else []
        if each.opcode == "tuple" and index:
            return [(each.operands[index[0]], index[1:])]
        if each.opcode == "while":
            body = re.search(r"\bbody=%?([\w.\-]+)", each.attributes)
            # An element that the body does not change is that of the start.
            return [(self._root(body[1]), index), (each.operands[0], index)] if body else []
        if each.opcode == "fusion":
            return [(self._root(called(each)[0]), index)]
        if each.opcode == "parameter" and (caller := self._callers.get(computation)):
            if caller.opcode == "while":
                return [(caller.name, index)]
            number = int(each.attributes[1:].partition(")")[0])
            return [(caller.operands[number], index)] if number < len(caller.operands) else []
        if each.opcode == "dynamic-update-slice":
            return [(each.operands[1], ())]
        # Copies, conversions and the like of the compiler have no name of their own.
        if each.operands and ("op_name=" not in each.attributes or each.opcode in ("bitcast", "dynamic-slice")):
            return [(each.operands[0], ())]
        return []

    def _root(self, computation: str) -> str:
        return next(each.name for each in self._program.computations[computation].values() if each.is_root)

    def _stated(self, each: Instruction) -> Origin | None:
        """Return the name and the line in the metadata of an instruction."""
        name = re.search(r'op_name="([^"]+)"', each.attributes)
        if name is None or each.opcode in ("get-tuple-element", "tuple"):
            return None
        frame = re.search(r"stack_frame_id=(\d+)", each.attributes)
        return Origin(readable(name[1]), self._lines.get(int(frame[1]), "") if frame else "")


def readable(name: str) -> str:
    r"""Return a name of JAX as a path.

    "state.params[\'clip\'][\'text\']" becomes "state/params/clip/text"; the scope of the jitted function is dropped.
    """
    name = name.replace("\\'", "'")
    if "/" not in name:
        name = re.sub(r"\['?([^'\]]*)'?\]", r"/\1", name).replace(".", "/")
    return re.sub(r"^jit\(\w+\)/", "", name)


def source_lines(text: str) -> dict[int, str]:
    """Return the innermost line of this package for each stack frame of a program, from the tables of its text."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in text.splitlines():
        if name := _TABLE.match(line):
            table = tables.setdefault(name[1], {})
        elif entry := _ENTRY.match(line):
            table[int(entry[1])] = entry[2] or entry[3] or ""
    files, frames, locations = (tables.get(name, {}) for name in ("FileNames", "StackFrames", "FileLocations"))
    numbers = {key: dict(_NUMBERS.findall(value)) for key, value in locations.items()}
    lines = {}
    for start in frames:
        frame = start
        while frame in frames:
            fields = dict(_NUMBERS.findall(frames[frame]))
            location = numbers.get(int(fields["file_location_id"]), {})
            path = pathlib.PurePath(files.get(int(location.get("file_name_id", 0)), ""))
            if _PACKAGE in path.parts:
                parts = path.parts[len(path.parts) - path.parts[::-1].index(_PACKAGE) :]
                lines[start] = f"{'/'.join(parts)}:{location['line']}"
                break
            frame = int(fields["parent_frame_id"]) - 1  # the text counts parents from 1, so that 1 is none
    return lines
