"""GGUF files through the gguf package: written, their header read within bounds, blocks of given trits and scales."""

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
_VERSIONS = (2, 3)  # for little-endian files they are the same
_READABLE = ("F32", "F16", "TQ1_0", "TQ2_0")
_MAX_AXES, _MAX_NAME = 4, 127
# GGUF's value types, by number, as struct's codes.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """Where a tensor lies: the name of its type, its shape (outermost axis first) and its first byte in the file."""

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
    """Writes a local file, tensor by tensor.

    Args:
      path: of the file.
      metadata: general.architecture, and others: int is stored as UINT32, float as FLOAT32; also bool, str, and
        sequences of float or str.
      tensors: name -> type and shape.
      contents: the bytes of the tensors as arrays of any shape, in the same order.

    Raises:
      ValueError: the gguf package is not installed.
    """
    gguf = _package()
    value, number = gguf.GGUFValueType, gguf.GGMLQuantizationType
    types = {bool: value.BOOL, int: value.UINT32, float: value.FLOAT32, str: value.STRING}
    with contextlib.closing(gguf.GGUFWriter(path, metadata[ARCHITECTURE_KEY])) as writer:
        for key, item in metadata.items():
            if key != ARCHITECTURE_KEY:  # the writer's first
                writer.add_key_value(key, item, types.get(type(item), value.ARRAY))
        for name, tensor in tensors.items():
            writer.add_tensor_info(name, tensor.shape, None, tensor.nbytes, number[tensor.type])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in contents:
            writer.write_tensor_data(np.ascontiguousarray(content))


def read_header(file: IO[bytes], size: int, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata (arrays of numbers as NumPy's) and the place of every tensor.

    gguf.GGUFReader loops over counts that the file states and makes objects for each item before a caller can check
    any of them, and needs a local file: so the header is parsed here, where memory grows with bytes read only.

    Args:
      file: at its first byte.
      size: of the file, in bytes.
      architecture: the general.architecture that the file must have.

    Raises:
      ValueError: no GGUF, one of another architecture, a file that ends too early, a name that comes twice, a tensor
        type other than F32, F16, TQ1_0 and TQ2_0, or tensors that are misaligned, overlap or reach beyond the end; or
        the gguf package is not installed.
    """
    gguf = _package()
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("not a GGUF file: it must begin with GGUF")
    cursor = _Cursor(file, size, len(_MAGIC))
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version {version}: versions 2 and 3, little-endian, can be read")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.name(metadata)
        metadata[key] = cursor.value(cursor.number("I"), key)
    # Before the tensors, whose types may be unknown just because of it.
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


def encode_blocks(trits: Array, scale: Array, kind: Kind) -> Bytes:
    """The blocks of a weight whose rows are its outputs: 256 consecutive weights of a row and their float16 scale.

    Args:
      trits: (N, K) of −1, 0, +1; K a multiple of 256.
      scale: (N, K / 256), each a float16 number; 0 only for a block of zero trits.
      kind: "tq1_0", 1.6875 bits a weight, or "tq2_0", 2.0625.

    Returns:
      uint8 (N, K / 256 · 54), or · 66.

    Raises:
      ValueError: shapes, trits or scales that are not so.
    """
    rows, length = trits.shape
    if length % BLOCK or scale.shape != (rows, length // BLOCK):
        raise ValueError(f"trits {trits.shape} with scales {scale.shape}: a scale is for {BLOCK} weights of a row")
    if trits.size and not -1 <= trits.min() <= trits.max() <= 1:
        raise ValueError(f"trits are −1, 0 and +1: found {trits.min()} to {trits.max()}")
    with np.errstate(over="ignore"):
        half = scale.astype("<f2")
    if (changed := half != scale).any():
        raise ValueError(f"scale {scale[changed][0]:.9g} is not a float16 number: scale_bits of 8 or 11 give such")
    _check_scales(trits, half)
    return _pack(trits, half, kind)


def decode_blocks(blocks: Bytes, kind: Kind) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Trits (N, K) int8 and scales (N, K / 256) float32 of `encode_blocks`, whose bytes are the only ones accepted.

    Raises:
      ValueError: bytes that no trits are encoded to, a scale that is negative or not finite, or 0 beside trits.
    """
    quants, number = _package().quants, _number(kind)
    ones = blocks.reshape(len(blocks), -1, _block(kind)[1]).copy()
    half = ones[..., -2:].copy().view("<f2")[..., 0]
    # With a scale of 1 the weights are the trits, whatever the scale.
    ones[..., -2:] = np.array([1], "<f2").view(np.uint8)
    trits = quants.dequantize(ones.reshape(blocks.shape), number).astype(np.int8)
    if not np.array_equal(_pack(trits, half, kind), blocks):
        raise ValueError(f"a byte of a {kind} block is no code of trits")
    _check_scales(trits, half)
    return trits, half.astype(np.float32)


def _pack(trits: Array, half: npt.NDArray[np.float16], kind: Kind) -> Bytes:
    """Blocks of these trits and scales.

    gguf.quants computes a block's scale from its weights, which loses that of a block of zeros: the given ones are put
    in their places.
    """
    packed: Bytes = _package().quants.quantize(trits.astype(np.float32), _number(kind))
    packed.reshape(*half.shape, -1)[..., -2:] = half[..., None].view(np.uint8)
    return packed


def _check_scales(trits: Array, half: npt.NDArray[np.float16]) -> None:
    if not np.isfinite(half).all() or np.signbit(half).any():
        raise ValueError("a scale is negative or not finite")
    if trits.reshape(*half.shape, BLOCK)[half == 0].any():
        raise ValueError("a scale is 0 beside trits that are not")


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: GGUF files need pip install 'tclip-jax[gguf]'") from None


def _number(kind: str) -> Any:
    return _package().GGMLQuantizationType[kind.upper()]


def _block(kind: str) -> tuple[int, int]:
    """Weights in a block of this type, and its bytes."""
    sizes: dict[Any, tuple[int, int]] = _package().GGML_QUANT_SIZES
    return sizes[_number(kind)]


class _Cursor:
    """Goes forward through a file, and asks it for no more bytes than it has left."""

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

    def tensor(self, name: str, types: Mapping[int, str]) -> Tensor:
        axes = self.number("I")
        if axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes: at most {_MAX_AXES} are possible")
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        number, offset = self.number("I"), self.number("Q")
        kind = types.get(number, f"number {number}")
        if kind not in _READABLE:
            raise ValueError(f"tensor {name} has type {kind}: {', '.join(_READABLE)} can be read")
        row = math.prod(shape[-1:])
        if row % _block(kind)[0]:
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
