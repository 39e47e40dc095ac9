"""Write GGUF files with the gguf package, read their headers safely, and encode trits and scales as blocks."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Kind = Literal["tq1_0", "tq2_0"]
Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK = 256
ARCHITECTURE_KEY = "general.architecture"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # identical for little-endian files
_READABLE = ("F32", "F16", "TQ1_0", "TQ2_0")
_MAX_AXES, _MAX_NAME = 4, 127
# Format characters of the struct module by GGUF value type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor of a file: the name of its type, its shape (outermost axis first), and the offset of its first byte."""

    type: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        block, size = _block(self.type)
        return math.prod(self.shape) // block * size


def write_file(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    contents: Iterable[Array],
) -> None:
    """Write a local GGUF file, tensor by tensor.

    Args:
      path: the file.
      metadata: values by key; general.architecture is required. An int is stored as UINT32, a float as FLOAT32; bool,
        str, and sequences of float or str are also possible.
      tensors: type and shape of each tensor, by name.
      contents: the bytes of each tensor, as an array of any shape, in the order of `tensors`.

    Raises:
      ValueError: the gguf package is not installed.
    """
    gguf = _package()
    value, number = gguf.GGUFValueType, gguf.GGMLQuantizationType
    types = {bool: value.BOOL, int: value.UINT32, float: value.FLOAT32, str: value.STRING}
    with contextlib.closing(gguf.GGUFWriter(path, metadata[ARCHITECTURE_KEY])) as writer:
        for key, item in metadata.items():
            if key != ARCHITECTURE_KEY:  # GGUFWriter writes it itself
                writer.add_key_value(key, item, types.get(type(item), value.ARRAY))
        for name, tensor in tensors.items():
            writer.add_tensor_info(name, tensor.shape, None, tensor.nbytes, number[tensor.type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in contents:
            writer.write_tensor_data(np.ascontiguousarray(content))


def read_header(file: IO[bytes], size: int, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header of a GGUF file.

    gguf.GGUFReader is not used: it needs a local file, and it allocates objects for all items that the file claims to
    have before a caller can check the counts. Here memory grows only with the bytes that were read.

    Args:
      file: the file, positioned at its first byte.
      size: size of the file in bytes.
      architecture: the required value of general.architecture.

    Returns:
      The metadata by key, with arrays of numbers as NumPy arrays, and the tensors by name.

    Raises:
      ValueError: the file is not a GGUF, has another architecture, is truncated, or repeats a name; a tensor has a type
        other than F32, F16, TQ1_0 and TQ2_0, is misaligned, overlaps another or exceeds the file; or the gguf package
        is not installed.
    """
    gguf = _package()
    metadata, tensor_count, cursor = _fields(file, size)
    # Before the tensors: other architectures may have types that are unknown here.
    if metadata.get(ARCHITECTURE_KEY) != architecture:
        raise ValueError(
            f"the architecture is {metadata.get(ARCHITECTURE_KEY)!r:.40}: only {architecture!r} can be read"
        )
    relative: dict[str, Tensor] = {}
    types = {number.value: number.name for number in gguf.GGMLQuantizationType}
    for _ in range(tensor_count):
        name = cursor.name(relative)
        relative[name] = cursor.tensor(name, types)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r:.40}: it must be a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in relative.items()}
    _check_places(tensors, alignment, start, size)
    return metadata, tensors


def read_metadata(file: IO[bytes], size: int) -> dict[str, Any]:
    """Read the metadata of a GGUF file of any architecture, by key; arguments and errors as of `read_header`."""
    return _fields(file, size)[0]


def _fields(file: IO[bytes], size: int) -> tuple[dict[str, Any], int, _Cursor]:
    """Return the metadata by key, the number of tensors, and the cursor, which is at the first of them."""
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("not a GGUF file: it must start with the bytes GGUF")
    cursor = _Cursor(file, size, len(_MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"the GGUF version is {version}: only 2 and 3, little-endian, can be read")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.name(metadata)
        metadata[key] = cursor.value(cursor.number("I"), key)
    return metadata, tensor_count, cursor


def encode_blocks(trits: Array, scale: Array, kind: Kind) -> Bytes:
    """Encode trits and scales as blocks; a block holds 256 consecutive weights of a row and their float16 scale.

    Source: block_tq1_0 and block_tq2_0 of ggml.

    Args:
      trits: (N, K) with values −1, 0, +1; one row for each output; K is a multiple of 256.
      scale: (N, K / 256), exact in float16; 0 only for a block of zeros.
      kind: "tq1_0", with 1.6875 bits a weight, or "tq2_0", with 2.0625.

    Returns:
      uint8 (N, K / 256 · 54) for "tq1_0", (N, K / 256 · 66) for "tq2_0".

    Raises:
      ValueError: a shape, trit or scale is invalid.
    """
    rows, length = trits.shape
    if length % BLOCK or scale.shape != (rows, length // BLOCK):
        raise ValueError(f"trits {trits.shape} with scales {scale.shape}: a scale is for {BLOCK} weights of a row")
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"trits are −1, 0 and +1: found {trits.min()} to {trits.max()}")
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if (changed := half != scale).any():
        raise ValueError(f"scale {scale[changed][0]:.9g} is not exact in float16: quantize with scale_bits 8 or 11")
    _check_scales(trits, half)
    return _pack(trits, half, kind)


def decode_blocks(blocks: Bytes, kind: Kind) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Decode blocks, the inverse of `encode_blocks`; only bytes that it can produce are accepted.

    Args:
      blocks: uint8 (N, bytes of a row).
      kind: the block type.

    Returns:
      Trits int8 (N, K), and scales float32 (N, K / 256).

    Raises:
      ValueError: a byte encodes no trits, or a scale is negative, not finite, or 0 for nonzero trits.
    """
    quants, number = _package().quants, _number(kind)
    ones = blocks.reshape(len(blocks), -1, _block(kind)[1]).copy()
    half = ones[..., -2:].copy().view("<f2")[..., 0]
    # With scales of 1 the dequantized weights are the trits.
    ones[..., -2:] = np.array([1], "<f2").view(np.uint8)
    trits = quants.dequantize(ones.reshape(blocks.shape), number).astype(np.int8)
    if not np.array_equal(_pack(trits, half, kind), blocks):
        raise ValueError(f"a byte of a {kind} block encodes no trits")
    _check_scales(trits, half)
    return trits, half.astype(np.float32)


def _pack(trits: Array, half: npt.NDArray[np.float16], kind: Kind) -> Bytes:
    """Return blocks with these trits and scales.

    gguf.quants computes a block's scale from its weights, and loses the scale of a block of zeros. This function
    overwrites its scales.
    """
    packed: Bytes = _package().quants.quantize(trits.astype(np.float32), _number(kind))
    packed.reshape(*half.shape, -1)[..., -2:] = half[..., None].view(np.uint8)
    return packed


def _check_scales(trits: Array, half: npt.NDArray[np.float16]) -> None:
    if not np.isfinite(half).all() or np.signbit(half).any():
        raise ValueError("a scale is negative or not finite")
    if trits.reshape(*half.shape, BLOCK)[half == 0].any():
        raise ValueError("a scale is 0 for nonzero trits")


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: GGUF files need pip install 'tclip-jax[gguf]'") from None


def _number(kind: str) -> Any:
    return _package().GGMLQuantizationType[kind.upper()]


def _block(kind: str) -> tuple[int, int]:
    """Return the number of weights in a block of this type, and its size in bytes."""
    sizes: dict[Any, tuple[int, int]] = _package().GGML_QUANT_SIZES
    return sizes[_number(kind)]


class _Cursor:
    """A forward reader of a file that never requests more bytes than the file has left."""

    def __init__(self, file: IO[bytes], size: int, position: int) -> None:
        self.file, self.size, self.position = file, size, position

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
        # Error messages of one line contain the name.
        if len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError(
                f"a name of {len(name)} characters starts with {name[:20]!r}: it is too long or not printable"
            )
        if name in known:
            raise ValueError(f"{name} is duplicated")
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
            raise ValueError(f"{key} is an array of value type {item}: only numbers and strings can be read")
        dtype = np.dtype(f"<{_SCALARS[item]}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor(self, name: str, types: Mapping[int, str]) -> Tensor:
        axes = self.number("I")
        if axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes: at most {_MAX_AXES} are allowed")
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        number, offset = self.number("I"), self.number("Q")
        kind = types.get(number, f"number {number}")
        if kind not in _READABLE:
            raise ValueError(f"tensor {name} has type {kind}: only {', '.join(_READABLE)} can be read")
        row = math.prod(shape[-1:])
        if row % _block(kind)[0]:
            raise ValueError(f"tensor {name} is {kind} with rows of {row}: the length must be a multiple of {BLOCK}")
        return Tensor(kind, shape, offset)


def _check_places(tensors: Mapping[str, Tensor], alignment: int, start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment:
            raise ValueError(f"tensor {name} starts at byte {tensor.offset}: it must be a multiple of {alignment}")
        # Reject overlaps: with them a small file could expand to much memory.
        if tensor.offset < end:
            raise ValueError(f"tensor {name} starts at byte {tensor.offset}: the previous tensor ends at {end}")
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise ValueError(f"truncated: tensor {name} ends at byte {end}, the file has {size}")
