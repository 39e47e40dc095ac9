"""The GGUF container: typed metadata, then tensors at aligned offsets; little-endian."""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.interop.gguf_blocks import BLOCK, BLOCK_BYTES

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # for little-endian files they are the same
_ALIGNMENT = 32
_MAX_AXES, _MAX_NAME = 4, 127

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9

# name -> (number, weights in a block, bytes of a block)
_TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "TQ1_0": (34, BLOCK, BLOCK_BYTES["tq1_0"]),
    "TQ2_0": (35, BLOCK, BLOCK_BYTES["tq2_0"]),
}
_NAME_OF_TYPE = {number: name for name, (number, _, _) in _TYPES.items()}
_OTHERS = (
    (2, "Q4_0 Q4_1"),
    (6, "Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K"),
    (24, "I8 I16 I32 I64 F64"),
    (30, "BF16"),
)
_UNREADABLE = {first + i: name for first, names in _OTHERS for i, name in enumerate(names.split())}


class Tensor(NamedTuple):
    """Where a tensor lies: the name of its type, its shape (outermost axis first) and its first byte in the file."""

    type: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        _, block, size = _TYPES[self.type]
        return math.prod(self.shape) // block * size


def read_header(file: IO[bytes], size: int, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata (arrays of numbers as NumPy's) and the place of every tensor; memory grows with bytes read only.

    Args:
      file: at its first byte.
      size: of the file, in bytes.
      architecture: the general.architecture that the file must have.

    Raises:
      ValueError: no GGUF, one of another architecture, a file that ends too early, a name that comes twice, a tensor
        type other than F32, F16, TQ1_0 and TQ2_0, or tensors that are misaligned, overlap or reach beyond the end.
    """
    cursor = _Cursor(file, size)
    if size < len(_MAGIC) or cursor.take(len(_MAGIC)) != _MAGIC:
        raise ValueError("not a GGUF file: it must begin with GGUF")
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}: versions 2 and 3, little-endian, can be read")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.name(metadata)
        metadata[key] = cursor.value(cursor.number("I"), key)
    # Before the tensors, whose types may be unknown just because of it.
    if metadata.get("general.architecture") != architecture:
        found = f"{metadata.get('general.architecture')!r:.40}"
        raise ValueError(f"the architecture is {found}: only {architecture!r} can be read")
    relative: dict[str, Tensor] = {}
    for _ in range(tensor_count):
        name = cursor.name(relative)
        relative[name] = cursor.tensor(name)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}: it must be a power of two")
    start = _aligned(cursor.position, alignment)
    tensors = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in relative.items()}
    _check_places(tensors, alignment, start, size)
    return metadata, tensors


def write_file(
    file: IO[bytes],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    contents: Iterable[npt.NDArray[Any]],
) -> None:
    """Writes version 3, tensor by tensor.

    Args:
      file: to write to.
      metadata: int is stored as UINT32, float as FLOAT32; also bool, str, and sequences of one of these.
      tensors: name -> type and shape, outermost axis first.
      contents: the bytes of the tensors as arrays of any shape, in the same order.
    """
    head = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))]
    head += [_string(key) + _typed(value) for key, value in metadata.items()]
    offset = 0
    for name, (kind, shape) in tensors.items():
        place = Tensor(kind, shape, offset)
        numbers = (len(shape), *reversed(shape), _TYPES[kind][0], offset)
        head.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", *numbers))
        offset += _aligned(place.nbytes, _ALIGNMENT)
    _write_padded(file, b"".join(head))
    for content in contents:
        _write_padded(file, content.tobytes())


class _Cursor:
    """Goes forward through a file, and asks it for no more bytes than it has left."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise ValueError(f"truncated: {count} bytes should follow byte {self.position}, the file has {self.size}")
        self.position += count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def name(self, known: Collection[str]) -> str:
        name = self.string()
        # Errors name it, in one line.
        if len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError(f"a name of {len(name)} characters begins with {name[:20]!r}: it is too long or no text")
        if name in known:
            raise ValueError(f"{name} is there twice")
        return name

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{key} has the unknown value type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise ValueError(f"{key} is an array of value type {item}: arrays of numbers and strings can be read")
        dtype = np.dtype(f"<{_SCALARS[item]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self, name: str) -> Tensor:
        axes = self.number("I")
        if axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes: at most {_MAX_AXES} are possible")
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        number, offset = self.number("I"), self.number("Q")
        if number not in _NAME_OF_TYPE:
            kind = _UNREADABLE.get(number, f"number {number}")
            raise ValueError(f"tensor {name} has type {kind}: {', '.join(_TYPES)} can be read")
        kind = _NAME_OF_TYPE[number]
        row = math.prod(shape[-1:])
        if row % _TYPES[kind][1]:
            raise ValueError(f"tensor {name} is {kind} with rows of {row}: they must be multiples of {BLOCK}")
        return Tensor(kind, shape, offset)


def _check_places(tensors: Mapping[str, Tensor], alignment: int, start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment:
            raise ValueError(f"tensor {name} begins at byte {tensor.offset}: that must be a multiple of {alignment}")
        # Overlapping tensors would let a small file ask for much memory.
        if tensor.offset < end:
            raise ValueError(f"tensor {name} begins at byte {tensor.offset}, inside the one that ends at byte {end}")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(f"truncated: tensor {name} ends at byte {end}, the file has {size}")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    """A value after its type; a sequence after the type of its items and their number."""
    if isinstance(value, list | tuple):
        items = [_typed(item) for item in value]
        return struct.pack("<I", _ARRAY) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    for kind, number in ((bool, _BOOL), (int, _UINT32), (float, _FLOAT32)):
        if isinstance(value, kind):
            return struct.pack(f"<I{_SCALARS[number]}", number, value)
    raise TypeError(f"{value!r} has no GGUF type")


def _write_padded(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.write(bytes(-len(data) % _ALIGNMENT))
