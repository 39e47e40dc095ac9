"""What HBM contains when a compiled step uses most of it, from the compiler's own assignment of buffers.

The compiler's text dumps are parsed, because libtpu leaves `serialized_buffer_assignment_proto` of its memory analysis
empty. They contain each buffer with its place and size, and the range of the schedule in which it is live.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from tclip_jax.planning.hlo import Array, Program, parse_arrays
from tclip_jax.planning.origins import Origins

LARGEST = 10  # arrays that a `Peak` names
_HBM = 0  # the compiler's number ("color") of this memory; the others are on the chip or of the host
_ALLOCATION = re.compile(r"allocation (\d+): size (\d+)(?:, color (\d+))?(?:, (.*))?:$")
_VALUE = re.compile(r" value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_RANGE = re.compile(r"    ([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)$")
_STEP = re.compile(r"    (\d+):([\w.\-]+)$")


class Result(NamedTuple):
    """A result of an instruction: `part` selects an element of a tuple."""

    instruction: str
    part: tuple[int, ...] = ()


class Buffer(NamedTuple):
    """The place of a result in its allocation, in bytes with the padding of tiles, and its array as XLA writes it."""

    result: Result
    offset: int
    size: int
    shape: str


@dataclasses.dataclass
class Allocation:
    """A part of a memory.

    Attributes:
      size: bytes.
      color: the compiler's number of the memory.
      kind: the compiler's description, such as "parameter 4, shape …" or "preallocated-temp".
      buffers: the results that use it, some of them at different times.
    """

    size: int
    color: int
    kind: str
    buffers: list[Buffer] = dataclasses.field(default_factory=list)


class Assignment(NamedTuple):
    """The compiler's assignment of buffers.

    Attributes:
      allocations: all allocations.
      ranges: a result -> the first and the last instruction at which it is live, as positions in the schedule.
      schedule: name of the instruction at each position, those within loops included.
    """

    allocations: list[Allocation]
    ranges: dict[Result, tuple[int, int]]
    schedule: list[str]


@dataclasses.dataclass(frozen=True)
class LiveArray:
    """An array in HBM at the peak.

    Attributes:
      name: path of an input, or JAX's name of the operation that makes the array, with its scopes.
      source: line of this package that makes it; "" if unknown, and for inputs.
      array: dtype and shape on one device.
      bytes: memory that it occupies, with the padding of tiles.
    """

    name: str
    source: str
    array: Array
    bytes: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LiveArray:
        array = Array(fields["array"]["dtype"], tuple(fields["array"]["dims"]), fields["array"]["on_chip"])
        return cls(fields["name"], fields["source"], array, fields["bytes"])


@dataclasses.dataclass(frozen=True)
class Peak:
    """The moment of a step at which most of HBM is in use.

    Attributes:
      inputs: bytes of inputs, outputs and constants, which occupy HBM during the whole step.
      temporaries: bytes of the temporaries that are live.
      allocated: bytes that are reserved for temporaries. They do not fill them, because of fragmentation.
      on_chip: maximum of live bytes in on-chip memory, at another moment.
      at: the operation that runs.
      source: line of this package that makes it, or "".
      count: number of arrays.
      arrays: the largest arrays, the largest first.
    """

    inputs: int
    temporaries: int
    allocated: int
    on_chip: int
    at: str
    source: str
    count: int
    arrays: tuple[LiveArray, ...]

    @property
    def total(self) -> int:
        return self.inputs + self.temporaries

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"total": self.total}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Peak:
        arrays = tuple(map(LiveArray.from_json, fields["arrays"]))
        return cls(**{each.name: fields[each.name] for each in dataclasses.fields(cls)} | {"arrays": arrays})


def dump_options(folder: epath.PathLike) -> dict[str, str]:
    """Return compiler options that write the assignment of buffers into a folder, for `read_assignment`."""
    return {"xla_dump_to": str(folder)}


def read_assignment(folder: epath.PathLike) -> Assignment:
    """Read the dumps of one program.

    Raises:
      ValueError: the compiler wrote none, those of several programs, or another format.
    """
    texts = {}
    for name in ("buffer-assignment", "live-range"):
        paths = list(epath.Path(folder).glob(f"*-{name}.txt"))
        if len(paths) != 1:
            raise ValueError(f"the compiler wrote {len(paths)} files *-{name}.txt for one program")
        texts[name] = paths[0].read_text()
    ranges, schedule = _parse_ranges(texts["live-range"])
    allocations = list(_parse_allocations(texts["buffer-assignment"]))
    known = {each.result for allocation in allocations for each in allocation.buffers}
    if not schedule or not ranges.keys() <= known:
        raise ValueError("the compiler's dump of buffers has another format than that of jax 0.10.2")
    return Assignment(allocations, ranges, schedule)


def find_peak(assignment: Assignment, program: Program, text: str) -> Peak:
    """Find the moment at which the inputs and the live temporaries occupy most of HBM.

    Temporaries that share memory, such as those of a loop and its body, count once.

    Args:
      assignment: the assignment of buffers.
      program: the compiled program.
      text: its text.
    """
    inputs, temporaries = list[Allocation](), list[Allocation]()
    for each in assignment.allocations:
        if each.color == _HBM and "thread-local" not in each.kind:
            (temporaries if "preallocated-temp" in each.kind else inputs).append(each)
    live, position = _most_live(temporaries, assignment.ranges)
    on_chip, _ = _most_live([each for each in assignment.allocations if each.color == 1], assignment.ranges)
    origins = Origins(program, text)
    arrays = [
        *(_array(_first(each.buffers, origins), each.size, origins) for each in inputs if each.buffers),
        *(_array(each, each.size, origins) for each in live),
    ]
    at = origins.find(assignment.schedule[position])
    return Peak(
        inputs=sum(each.size for each in inputs),
        temporaries=sum(each.size for each in live),
        allocated=sum(each.size for each in temporaries),
        on_chip=sum(each.size for each in on_chip),
        at=at.name,
        source=at.source,
        count=len(arrays),
        arrays=tuple(sorted(arrays, key=lambda each: -each.bytes)[:LARGEST]),
    )


def _parse_allocations(text: str) -> Iterator[Allocation]:
    current = None
    for line in text.splitlines():
        if head := _ALLOCATION.match(line):
            if current:
                yield current
            current = Allocation(int(head[2]), int(head[3] or 0), head[4] or "")
        elif current and (value := _VALUE.match(line)):
            result = Result(value[1], _index(value[2]))
            current.buffers.append(Buffer(result, int(value[4]), int(value[3]), value[5]))
        elif not line.startswith((" ", "BufferAssignment")):
            break  # statistics
    if current:
        yield current


def _parse_ranges(text: str) -> tuple[dict[Result, tuple[int, int]], list[str]]:
    ranges, schedule = {}, []
    for line in text.splitlines():
        if live := _RANGE.match(line):
            ranges[Result(live[1], _index(live[2]))] = int(live[3]), int(live[4])
        elif step := _STEP.match(line):
            schedule.append(step[2])
        elif line.startswith("  Live ranges at"):
            break  # the compiler's own peak, without the padding of tiles and with on-chip memory
    return ranges, schedule


def _index(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def _most_live(allocations: Iterable[Allocation], ranges: Mapping[Result, tuple[int, int]]) -> tuple[list[Buffer], int]:
    """Return the buffers at the position with most live bytes, one for each place, and this position.

    The size of a buffer that overlaps another is what it adds.
    """
    starts: defaultdict[int, list[tuple[int, Buffer]]] = defaultdict(list)
    buffers = [(i, buffer) for i, each in enumerate(allocations) for buffer in each.buffers]
    for i, buffer in buffers:
        if buffer.result in ranges:
            starts[ranges[buffer.result][0]].append((i, buffer))
    best, best_size, position = list[Buffer](), 0, 0
    live: list[tuple[int, Buffer]] = []
    for now in sorted(starts):
        live = [each for each in live if ranges[each[1].result][1] >= now] + starts[now]
        places = _places(live)
        if (size := sum(each.size for each in places)) > best_size:
            best, best_size, position = places, size, now
    return best, position


def _places(live: Iterable[tuple[int, Buffer]]) -> list[Buffer]:
    """Return one buffer for each place, with the bytes that it adds to those before."""
    ends: dict[int, int] = {}
    places = []
    # The largest buffer at an offset first, which contains the others; of equal ones the first that was made.
    for allocation, each in sorted(live, key=lambda pair: (pair[0], pair[1].offset, -pair[1].size)):
        start = max(each.offset, ends.get(allocation, 0))
        if each.offset + each.size > start:
            places.append(each._replace(size=each.offset + each.size - start))
            ends[allocation] = each.offset + each.size
    return places


def _first(buffers: list[Buffer], origins: Origins) -> Buffer:
    """Return the buffer of the parameter, if there is one: others use its memory after its last use."""
    return max(buffers, key=lambda each: (origins.is_input(each.result.instruction), each.size))


def _array(buffer: Buffer, size: int, origins: Origins) -> LiveArray:
    name, source = origins.find(*buffer.result)
    arrays = parse_arrays(buffer.shape)
    return LiveArray(name, source, max(arrays, key=lambda each: each.bytes, default=Array("", ())), size)
