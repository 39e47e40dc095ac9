"""Edit and read .tflite files, which are FlatBuffers.

The schema's Python code is that of litert-converter or of ai-edge-litert. It checks nothing, so files are read field by
field, and every size is compared with that of its buffer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.interop.litert_integers import Integers
from tclip_jax.interop.litert_tower import Skeleton

Matrix = Integers | npt.NDArray[np.float32]

IDENTIFIER = b"TFL3"
METADATA = "tclip_jax"  # the name of our entry in a file's metadata
_ALIGNMENT = 16  # bytes, of every buffer: the schema's force_align, which the Python code ignores
_OUTPUTS = 8  # the place of SubGraph.outputs in a vtable
_MAX_BYTES = 2**31 - 2**20  # of a FlatBuffer; the graph without its weights is smaller than the rest


def fill_skeleton(skeleton: Skeleton, matrices: Mapping[str, Matrix], metadata: bytes) -> bytes:
    """Return the file of a tower: the matrices are constants under their names, and the taps are no longer outputs.

    Args:
      skeleton: a converted tower.
      matrices: values of the matrices by name; INT4, INT8 or float32, of the shapes of the skeleton.
      metadata: stored as `METADATA`.

    Raises:
      ValueError: the file would exceed 2 GiB.
    """
    schema = _schema()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(skeleton.file, 0))
    (graph,), (signature,) = model.subgraphs, model.signatureDefs

    def add_buffer(array: npt.NDArray[Any]) -> int:
        model.buffers.append(schema.BufferT(data=np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
        return len(model.buffers) - 1

    inputs = {each.name.decode(): each for each in signature.inputs}
    for name, value in matrices.items():
        tensor = graph.tensors[inputs.pop(name).tensorIndex]
        tensor.name = name
        tensor.buffer = add_buffer(value.codes if isinstance(value, Integers) else value)
        if isinstance(value, Integers):
            tensor.type = schema.TensorType.INT4 if value.bits == 4 else schema.TensorType.INT8
            tensor.quantization = schema.QuantizationParametersT()
            if value.block is None:
                tensor.quantization.scale = value.scale
                tensor.quantization.zeroPoint = np.zeros(len(value.scale), np.int64)
                continue
            scales = schema.TensorT(
                name=f"{name}.scale",
                shape=list(value.scale.shape),
                type=schema.TensorType.FLOAT16,
                buffer=add_buffer(value.scale),
                hasRank=True,
            )
            graph.tensors.append(scales)
            tensor.quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
            tensor.quantization.details = schema.BlockwiseQuantizationT(
                scales=len(graph.tensors) - 1, zeroPoints=-1, blockSize=value.block
            )
    for each in signature.outputs:
        graph.tensors[each.tensorIndex].name = each.name
    signature.inputs = list(inputs.values())
    signature.outputs = [each for each in signature.outputs if each.name.decode() not in skeleton.taps]
    graph.inputs = [each.tensorIndex for each in signature.inputs]
    graph.outputs = [each.tensorIndex for each in signature.outputs]
    model.metadata.append(schema.MetadataT(name=METADATA, buffer=add_buffer(np.frombuffer(metadata, np.uint8))))
    model.description = "tclip_jax"
    for each in model.buffers:
        each.Pack = functools.partial(_pack_buffer, schema, each.data)
    size = sum(0 if each.data is None else len(each.data) for each in model.buffers)
    if size > _MAX_BYTES:
        raise ValueError(f"{size:,} bytes of weights: a LiteRT file holds {_MAX_BYTES:,}")
    builder = importlib.import_module("flatbuffers").Builder(size + 2**20)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _pack_buffer(schema: Any, data: npt.NDArray[np.uint8] | None, builder: Any) -> int:
    """Add a buffer, aligned as `_ALIGNMENT`, to a file that is built from its end."""
    if data is not None:
        builder.StartVector(1, len(data), _ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data.tobytes()
        vector = builder.EndVector()
    schema.BufferStart(builder)
    if data is not None:
        schema.BufferAddData(builder, vector)
    return schema.BufferEnd(builder)


class Flatbuffer:
    """A .tflite file that is read field by field; every method raises ValueError if the file is damaged.

    Attributes:
      path: the file.
      content: its bytes.
    """

    def __init__(self, path: epath.PathLike) -> None:
        """Read a file.

        Raises:
          FileNotFoundError: the file does not exist.
          ValueError: it is no .tflite file, or neither LiteRT nor its converter is installed.
        """
        self.path = epath.Path(path)
        self.content = self.path.read_bytes()
        self._schema = _schema()
        with self._checked():
            if self.content[4:8] != IDENTIFIER:
                raise ValueError(f"it does not have the identifier {IDENTIFIER.decode()}")
            self._model = self._schema.Model.GetRootAs(self.content, 0)
            self._graph = self._model.Subgraphs(0)
            tensors = [self._graph.Tensors(i) for i in range(self._graph.TensorsLength())]
            self._tensors = {tensor.Name().decode(): (i, tensor) for i, tensor in enumerate(tensors)}

    def metadata(self) -> bytes:
        """Return what `fill_skeleton` stored as metadata; empty if there is none."""
        with self._checked():
            entries = [self._model.Metadata(i) for i in range(self._model.MetadataLength())]
            found = [entry.Buffer() for entry in entries if entry.Name() == METADATA.encode()]
            return self._bytes(found[0]).tobytes() if found else b""

    def names(self) -> Sequence[str]:
        """Return the names of all tensors."""
        return tuple(self._tensors)

    def integer_names(self) -> Sequence[str]:
        """Return the names of the INT4 and INT8 tensors."""
        with self._checked():
            return tuple(name for name, (_, tensor) in self._tensors.items() if tensor.Type() in self._widths())

    def matrix(self, name: str) -> Matrix:
        """Return a matrix by its name."""
        types = self._schema.TensorType
        with self._checked(name):
            _, tensor = self._tensors[name]
            if tensor.Type() not in self._widths():
                return self._array(tensor, {types.FLOAT32: np.float32}).copy()
            (rows, columns), quantization = self._shape(tensor, 2), tensor.Quantization()
            if quantization.DetailsType() == self._schema.QuantizationDetails.BlockwiseQuantization:
                details, union = self._schema.BlockwiseQuantization(), quantization.Details()
                details.Init(union.Bytes, union.Pos)
                scale = self._array(self._graph.Tensors(details.Scales()), {types.FLOAT16: np.float16})
                if details.BlockSize() * scale.shape[1] != columns or details.ZeroPoints() > 0:
                    raise ValueError(f"blocks of {details.BlockSize()}, not {columns} / {scale.shape[1]} inputs")
            else:
                scale = quantization.ScaleAsNumpy()
                if quantization.DetailsType() or quantization.QuantizedDimension() or np.size(scale) != rows:
                    raise ValueError("it has no scale for each row")
            return Integers(self._bytes(tensor.Buffer()), (rows, columns), scale, self._widths()[tensor.Type()])

    def _widths(self) -> dict[int, int]:
        """Return the bits of each type of integers."""
        return {self._schema.TensorType.INT4: 4, self._schema.TensorType.INT8: 8}

    def with_outputs(self, names: Sequence[str]) -> tuple[bytes, list[int]]:
        """Return the file with other outputs, and the indices of these tensors; the signature stays as it is."""
        with self._checked():
            indices = [self._tensors[name][0] for name in names]
            field = self._graph._tab.Pos + self._graph._tab.Offset(_OUTPUTS)
        padded = bytearray(self.content + bytes(-len(self.content) % _ALIGNMENT))
        padded[field : field + 4] = struct.pack("<I", len(padded) - field)  # to the vector that is appended
        return bytes(padded + struct.pack(f"<I{len(indices)}i", len(indices), *indices)), indices

    def _shape(self, tensor: Any, axes: int) -> tuple[int, ...]:
        if tensor.ShapeLength() != axes:
            raise ValueError(f"it has {tensor.ShapeLength()} axes, not {axes}")
        return tuple(int(side) for side in tensor.ShapeAsNumpy())

    def _array(self, tensor: Any, dtypes: Mapping[int, type[np.floating]]) -> npt.NDArray[Any]:
        """Return the values of a tensor of two axes, whose type is a key of `dtypes`."""
        shape, dtype = self._shape(tensor, 2), dtypes.get(tensor.Type())
        if dtype is None:
            raise ValueError(f"it has the type {tensor.Type()}, not {next(iter(dtypes.values())).__name__}")
        data = self._bytes(tensor.Buffer())
        if min(shape) < 0 or data.size != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f"{data.size} bytes do not hold {shape}")
        return np.frombuffer(data, dtype).reshape(shape)

    def _bytes(self, buffer: int) -> npt.NDArray[np.uint8]:
        if not 0 < buffer < self._model.BuffersLength() or not self._model.Buffers(buffer).DataLength():
            raise ValueError(f"the buffer {buffer} is missing or empty")
        data: npt.NDArray[np.uint8] = self._model.Buffers(buffer).DataAsNumpy()
        return data

    @contextlib.contextmanager
    def _checked(self, name: str = "") -> Iterator[None]:
        """Turn what the schema's code raises on damaged files into one line."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
            words = " ".join(str(error).split())[:200]
            words = f"{name!r:.80}: {words}" if name else words
            raise ValueError(f"{self.path} is not a LiteRT file, or a damaged one: {words}") from None


def _schema() -> Any:
    """Return the Python code of the schema."""
    for package in ("litert_converter", "ai_edge_litert"):
        if importlib.util.find_spec(package):
            return importlib.import_module(f"{package}.schema_py_generated")
    raise ValueError("LiteRT files need pip install 'tclip-jax[litert]'")
