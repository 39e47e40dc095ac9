"""Read the tensors of a TorchScript archive, the format in which OpenAI published CLIP, without running its code.

The Hugging Face hub has the same weights as safetensors. This reader serves OpenAI's own files, and needs no PyTorch.
The archive is a zip file: `data.pkl` holds the tree of modules, `data/N` the storages, `code/` the source code.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.schema import plain

_STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}
# Limit in bytes, far above CLIP: its tree of modules has a few hundred KB, its program a few MB.
_MAX_TEXT = 64 * 2**20
# Not a parameter or buffer: tracing stores the causal mask as an attribute.
_MASK = "attn_mask"


class _Module:
    """A module of the archive: its attributes, without its code."""


class _Storage(NamedTuple):
    dtype: np.dtype[Any]
    member: str
    size: int


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds only tensors and modules without code."""

    def __init__(self, path: epath.Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive, self._root = path, archive, archive.namelist()[0].split("/")[0]
        data = _read_text(archive, f"{self._root}/data.pkl")
        _check_lengths(data)
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return functools.partial(_tensor, self._path)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return jnp.dtype(_STORAGES[name])
        if module.split(".")[0] == "__torch__":
            return type(name, (_Module,), {})
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only tensors are read")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, size = pid
        member = self._archive.getinfo(f"{self._root}/data/{key}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != size * dtype.itemsize:
            raise ValueError(
                f"{member.filename} has {member.file_size} bytes: it must hold {size} {dtype}, uncompressed"
            )
        return _Storage(dtype, member.filename, size)


def is_torchscript(path: epath.Path) -> bool:
    """Return whether a file is an intact zip archive that holds TorchScript code."""
    try:
        with _opened(path) as archive:
            return any(re.match(r"[^/]+/code/", name) for name in archive.namelist())
    except ValueError:
        return False


def read_torchscript(path: epath.Path) -> dict[str, LazyArray]:
    """Return the tensors of an archive, lazily, by their names in PyTorch's state dict.

    Raises:
      ValueError: the archive is damaged, or holds more than modules and tensors.
    """
    with _opened(path) as archive:
        module = _Unpickler(path, archive).load()
        return {name: value for name, value in _tensors(module, "", set()) if name.rpartition(".")[2] != _MASK}


def torchscript_activation(path: epath.Path) -> bool | None:
    """Return whether the source code of an archive calls QuickGELU (True) or GELU (False); None for neither or both.

    Raises:
      ValueError: the program is damaged or too long.
    """
    with _opened(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        if sum(archive.getinfo(name).file_size for name in names) > _MAX_TEXT:
            raise ValueError(f"its program has more than {_MAX_TEXT} bytes, the limit")
        program = "".join(archive.read(name).decode() for name in names)
    quick, exact = ("torch.sigmoid(" in program), ("torch.gelu(" in program)
    return quick if quick != exact else None


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; any error in the block becomes a ValueError of one line that names the file."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield archive
    # Damaged archives and pickles raise many kinds of errors.
    except Exception as error:
        reason = plain(str(error).partition("\n")[0] or type(error).__name__, 200)
        raise ValueError(f"{path} is not a readable TorchScript archive: {reason}") from None


def _read_text(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _MAX_TEXT:
        raise ValueError(f"{name} has {size} bytes: at most {_MAX_TEXT} are read")
    return archive.read(name)


def _check_lengths(data: bytes) -> None:
    """Raise ValueError for memo indices beyond the pickle's length, for which pickle would allocate memory at once."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument not in range(len(data)):
            raise ValueError(f"data.pkl has the memo index {argument}: it must be below its {len(data)} bytes")


def _tensors(module: Any, prefix: str, seen: set[int]) -> list[tuple[str, LazyArray]]:
    # Shared modules could make the tree infinite or exponentially large.
    if id(module) in seen:
        raise ValueError(f"{prefix}* is shared with another name: a CLIP shares no modules")
    seen.add(id(module))
    tensors = []
    for name, value in vars(module).items():
        if isinstance(value, LazyArray):
            tensors.append((prefix + name, value))
        elif isinstance(value, _Module):
            tensors += _tensors(value, f"{prefix}{name}.", seen)
    return tensors


def _tensor(
    path: epath.Path, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> LazyArray:
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # Reject strides of 0: with them a small file could expand to much memory.
    if (
        min((offset, *shape, *strides)) < 0
        or math.prod(shape) > storage.size
        or (0 not in shape and last >= storage.size)
    ):
        raise ValueError(
            f"{storage.member} has {storage.size} numbers: it cannot hold shape {shape} at offset {offset}"
        )

    def load() -> npt.NDArray[Any]:
        with _opened(path) as archive:
            flat = np.frombuffer(archive.read(storage.member), storage.dtype, storage.size)[offset:]
        return np.lib.stride_tricks.as_strided(
            flat, shape, [stride * storage.dtype.itemsize for stride in strides], writeable=False
        )

    return LazyArray(tuple(shape), storage.dtype, load)
