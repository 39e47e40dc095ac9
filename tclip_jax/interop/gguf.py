"""Write and read a two-tower CLIP as one GGUF file, with clip.cpp's names and ternary weights in TQ1_0 or TQ2_0."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from tclip_jax.artifacts.pack import check_no_uniform, flatten
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.gguf_file import (
    BLOCK,
    KINDS,
    Array,
    Kind,
    Tensor,
    decode_blocks,
    encode_blocks,
    read_header,
    write_file,
)
from tclip_jax.interop.gguf_metadata import (
    ARCHITECTURE,
    GgufEntry,
    GgufModel,
    from_metadata,
    gguf_table,
    to_metadata,
)
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, TERNARIZABLE, input_axis
from tclip_jax.schema import check_names
from tclip_jax.storage import atomic_local_file
from tclip_jax.ternary import TernaryTensor

_KINDS: dict[str, Kind] = {kind.upper(): kind for kind in KINDS}


class _Ternary(NamedTuple):
    """Trits (…, K, N) and a scale for each 256 inputs (…, K / 256, N); the inputs of an embedding are the last axis."""

    trits: Array
    scale: Array


def write_gguf(
    path: epath.PathLike, *, config: CLIPConfig, preprocess: Preprocess, params: Mapping[str, Any], kind: Kind
) -> None:
    """Write a model as a GGUF file, atomically. Equal arguments give equal bytes.

    Args:
      path: the file, local or remote (gs://).
      config: the model.
      preprocess: the preprocessing of its images.
      params: parameter tree with at least one `TernaryTensor`. Float parameters are stored as F32; the patch embedding
        is F16, as clip.cpp requires, if that is exact.
      kind: block type of the ternary weights.

    Raises:
      ValueError: GGUF cannot express the model, its preprocessing, groups or scales; the parameters do not match
        `config`; or the gguf package is not installed.
    """
    shapes, leaves = _shapes(config), flatten(params)
    check_names(leaves, shapes, "the parameter tree")
    check_no_uniform(leaves, "GGUF")
    if not any(isinstance(leaf, TernaryTensor) for leaf in leaves.values()):
        raise ValueError(f"no parameter is ternary: a GGUF of kind {kind} needs at least one")
    logit_scale = float(_storable("logit_scale", leaves["logit_scale"], ()))  # type: ignore[arg-type]
    metadata = to_metadata(GgufModel(config, preprocess, logit_scale), kind)
    entries = gguf_table(shapes)
    tensors = {entry.name: _tensor(entry, value, kind) for entry, value in _storables(entries, leaves, shapes)}
    with atomic_local_file(path) as name:
        contents = (_encode(entry, value, kind) for entry, value in _storables(entries, leaves, shapes))
        write_file(name, metadata, tensors, contents)


def read_gguf(path: epath.PathLike) -> tuple[CLIPConfig, Preprocess, dict[str, Any]]:
    """Read a GGUF file of a two-tower CLIP.

    Every size is checked against the file's size and the configuration before that much is allocated.

    Returns:
      The model, its preprocessing, and its parameters: NumPy float32 arrays, and `TernaryTensor` with groups of 256.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, has another architecture, or is not a CLIP with two towers. One line names it.
    """
    path = epath.Path(path)
    with path.open("rb") as file:
        try:
            (config, preprocess, _), leaves = _open(file, path.stat().length)
            return config, preprocess, unflatten_dict(dict(leaves), sep="/")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def verify_gguf(path: epath.PathLike, params: Mapping[str, Any]) -> None:
    """Compare every bit of a GGUF file with the parameters from which it was written: trits, scales and floats.

    Raises:
      ValueError: the file cannot be read, or a parameter differs; the message names the first.
    """
    path, expected = epath.Path(path), flatten(params)
    with path.open("rb") as file:
        try:
            model, stored = _open(file, path.stat().length)
            shapes = _shapes(model.config)
            check_names(shapes, expected, "the file")
            for name, leaf in stored:
                if not _same(leaf, _storable(name, expected[name], shapes[name])):
                    raise ValueError(f"{name} differs from the given parameters")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _open(file: IO[bytes], size: int) -> tuple[GgufModel, Iterator[tuple[str, Any]]]:
    """Return the model that a file describes, and an iterator that reads its parameters, as (path, value)."""
    metadata, tensors = read_header(file, size, ARCHITECTURE)
    model = from_metadata(metadata)
    shapes = _shapes(model.config)
    places = _places(shapes, tensors)

    def leaves() -> Iterator[tuple[str, Any]]:
        yield "logit_scale", np.asarray(model.logit_scale, np.float32)
        for path, pieces in places.items():
            yield path, _read(file, path, shapes[path], pieces)

    return model, leaves()


def _shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(param_shapes(config)).items()}


def _storables(
    entries: list[GgufEntry], leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[GgufEntry, Array | _Ternary]]:
    """Yield every entry with its parameter, which is converted once for all entries of a path."""
    for path, of_path in itertools.groupby(entries, lambda entry: entry.path):
        value = _storable(path, leaves[path], shapes[path])
        for entry in of_path:
            yield entry, value


def _storable(path: str, leaf: Any, shape: tuple[int, ...]) -> Array | _Ternary:
    """Return a parameter as the file stores it: floats in their stored dtype, or trits with a scale for each 256."""
    if path == PATCH_EMBEDDING and isinstance(leaf, TernaryTensor):
        leaf = np.asarray(leaf.dequantize()).reshape(shape)  # clip.cpp needs floats for the convolution
    if np.shape(leaf) != shape:
        raise ValueError(f"{path} has shape {np.shape(leaf)}: the model's is {shape}")
    if isinstance(leaf, TernaryTensor):
        return _in_blocks(path, leaf)
    value = np.asarray(leaf, np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{path} holds NaN or infinity: every number must be finite")
    if path == PATCH_EMBEDDING:
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        return half if (half == value).all() else value
    return value


def _in_blocks(path: str, leaf: TernaryTensor) -> _Ternary:
    trits, scale, axis, group = np.asarray(leaf.trits), np.asarray(leaf.scale), leaf.axis, leaf.group
    length, count = trits.shape[axis], scale.shape[axis]
    if axis != input_axis(path) or length % BLOCK or (count > 1 and (group % BLOCK or length % group)):
        raise ValueError(
            f"{path} has groups of {group} along {length} inputs: GGUF has a scale for each {BLOCK} inputs, "
            f"so the group must be a multiple of {BLOCK} that divides the inputs"
        )
    shape = list(trits.shape)
    shape[axis] = length // BLOCK
    return _Ternary(trits, np.broadcast_to(scale.repeat(shape[axis] // count, axis), shape))


def _tensor(entry: GgufEntry, value: Array | _Ternary, kind: Kind) -> Tensor:
    if isinstance(value, _Ternary):
        return Tensor(kind.upper(), entry.view(value.trits).shape)
    return Tensor("F16" if value.dtype == np.float16 else "F32", entry.view(value).shape)


def _encode(entry: GgufEntry, value: Array | _Ternary, kind: Kind) -> Array:
    if not isinstance(value, _Ternary):
        return entry.view(value)
    try:
        return encode_blocks(entry.view(value.trits), entry.view(value.scale), kind)
    except ValueError as error:
        raise ValueError(f"{entry.path}: {error}") from None


def _places(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> dict[str, list[tuple[GgufEntry, Tensor]]]:
    """Return the tensors of each parameter; raise ValueError for a wrong name, shape or type."""
    entries = gguf_table(shapes)
    check_names(tensors, {entry.name for entry in entries}, "the list of tensors")
    places: dict[str, list[tuple[GgufEntry, Tensor]]] = {}
    for entry in entries:
        tensor, pieces = tensors[entry.name], places.setdefault(entry.path, [])
        expected = entry.view(np.broadcast_to(np.int8(0), shapes[entry.path])).shape
        if tensor.shape != expected:
            raise ValueError(f"tensor {entry.name} has shape {tensor.shape}: the model's is {expected}")
        if tensor.type in _KINDS and (entry.path == PATCH_EMBEDDING or entry.path not in TERNARIZABLE):
            raise ValueError(f"tensor {entry.name} has type {tensor.type}: it must be F32 or F16")
        if pieces and (pieces[0][1].type in _KINDS) != (tensor.type in _KINDS):
            raise ValueError(f"tensor {entry.name} has type {tensor.type}, {pieces[0][0].name} has {pieces[0][1].type}")
        pieces.append((entry, tensor))
    return places


def _read(file: IO[bytes], path: str, shape: tuple[int, ...], pieces: list[tuple[GgufEntry, Tensor]]) -> Any:
    """Read the parameter at `path`, tensor by tensor."""
    if pieces[0][1].type not in _KINDS:
        floats = np.empty(shape, np.float32)
        for entry, tensor in pieces:
            entry.view(floats)[...] = _read_floats(file, entry.name, tensor)
        return floats
    axis = input_axis(path)
    groups = list(shape)
    groups[axis] //= BLOCK
    trits, scale = np.empty(shape, np.int8), np.empty(groups, np.float32)
    for entry, tensor in pieces:
        blocks = np.frombuffer(_bytes(file, tensor), np.uint8).reshape(tensor.shape[0], -1)
        try:
            entry.view(trits)[...], entry.view(scale)[...] = decode_blocks(blocks, _KINDS[tensor.type])
        except ValueError as error:
            raise ValueError(f"tensor {entry.name}: {error}") from None
    leaf: Any = TernaryTensor(trits, scale, BLOCK, axis)  # type: ignore[arg-type]
    return leaf


def _read_floats(file: IO[bytes], name: str, tensor: Tensor) -> Array:
    values = np.frombuffer(_bytes(file, tensor), "<f4" if tensor.type == "F32" else "<f2")
    if not np.isfinite(values).all():
        raise ValueError(f"tensor {name} holds NaN or infinity: every number must be finite")
    return values.reshape(tensor.shape)


def _bytes(file: IO[bytes], tensor: Tensor) -> bytes:
    file.seek(tensor.offset)
    return file.read(tensor.nbytes)


def _same(actual: Any, expected: Array | _Ternary) -> bool:
    if isinstance(actual, TernaryTensor) and isinstance(expected, _Ternary):
        return np.array_equal(actual.trits, expected.trits) and _same_bits(actual.scale, expected.scale)
    if isinstance(actual, TernaryTensor) or isinstance(expected, _Ternary):
        return False
    return _same_bits(actual, expected)


def _same_bits(actual: Any, expected: Array) -> bool:
    """Return whether two arrays have the same bits in float32; −0 differs from +0."""
    first, second = (np.asarray(array, np.float32).view(np.uint32) for array in (actual, expected))
    return np.array_equal(first, second)
