"""Read and write archives of NumPy arrays (.npz), local or remote, with one array in memory at a time.

Hand-written: `np.load` reads headers and arrays of any size that a file states, and `np.savez` needs all arrays in
memory. bfloat16, which NumPy lacks, is stored as two bytes without a type (|V2), as big_vision stores it.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray, LazyStack
from tclip_jax.schema import plain

_SUFFIX = ".npy"
_MAX_MEMBERS = 100_000
_MAX_HEADER_BYTES = 16_384  # of an array; NumPy's own limit is 10,000
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of the name and of the extra field
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_KINDS = ("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint32")
_CHUNK = 16 * 2**20
_BFLOAT16 = jnp.dtype("bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class NpzArray(LazyArray):
    """An array of an archive, not in memory. What is read of it is checked against its checksum in the archive.

    Attributes:
      path: the archive.
      name: name of the array's file in it.
      member: first byte of that file, its length, and its CRC-32.
      start: first byte of the values.
      by_columns: whether the first axis varies fastest.
    """

    path: epath.Path
    name: str
    member: tuple[int, int, int]
    start: int
    by_columns: bool

    def layers(self) -> LazyStack:
        """Return the array as a stack over its first axis, each layer of which is read alone."""
        return LazyStack(
            tuple(
                LazyArray(self.shape[1:], self.dtype, functools.partial(self._layer, i)) for i in range(self.shape[0])
            )
        )

    def _layer(self, index: int) -> npt.NDArray[Any]:
        if self.by_columns:
            return np.ascontiguousarray(self.load()[index])
        self._check()
        return self._values(index * math.prod(self.shape[1:]), self.shape[1:])

    def _values(self, first: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Read values of this shape from value `first` on."""
        with self.path.open("rb") as file:
            file.seek(self.start + first * self.dtype.itemsize)
            return np.frombuffer(file.read(math.prod(shape) * self.dtype.itemsize), self.dtype).reshape(shape)

    def _check(self) -> None:
        """Raise ValueError unless the checksum is right."""
        if not self._is_whole:
            raise ValueError(f"{self.path}: {self.name} is damaged: its bytes do not have the stored checksum")

    @functools.cached_property
    def _is_whole(self) -> bool:
        start, left, expected = self.member
        checksum = 0
        with self.path.open("rb") as file:
            file.seek(start)
            while left and (data := file.read(min(left, _CHUNK))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
        return not left and checksum == expected


def read_npz(path: epath.PathLike) -> dict[str, NpzArray]:
    """Check the directory and the header of every array of a file, and return the arrays by name, lazily.

    Raises:
      ValueError: the file is damaged, compressed or encrypted, or holds other things than arrays of numbers. One line
        names the file and the array.
    """
    path = epath.Path(path)
    size = path.stat().length
    arrays: dict[str, NpzArray] = {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS:
                raise ValueError(f"it has {len(members)} members: at most {_MAX_MEMBERS} are read")
            for member in members:
                name = member.filename.removesuffix(_SUFFIX)
                if name in arrays:
                    raise ValueError(f"{plain(name)} is duplicated")
                arrays[name] = _open(path, file, member)
            # Members that overlap would expand a small file to much memory.
            if sum(member.file_size for member in members) > size:
                raise ValueError(f"its members are longer than its {size} bytes")
    # zipfile raises many kinds of errors for a damaged directory.
    except Exception as error:
        raise ValueError(f"{path} is not an archive of NumPy arrays: {plain(str(error) or repr(error), 200)}") from None
    return arrays


def _open(path: epath.Path, file: Any, member: zipfile.ZipInfo) -> NpzArray:
    """Return the array of a member, after a check of its header."""
    name = plain(member.filename)
    if not member.filename.endswith(_SUFFIX):
        raise ValueError(f"it holds {name}, which is no array (.npy)")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise ValueError(f"{name} is compressed: write the file by np.savez, which does not compress")
    if member.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    file.seek(member.header_offset)
    signature, *lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\3\4":
        raise ValueError(f"{name} is not where the directory states it")
    begin = member.header_offset + _LOCAL_HEADER.size + sum(lengths)
    file.seek(begin)
    head = io.BytesIO(file.read(min(member.file_size, _MAX_HEADER_BYTES)))
    version = np.lib.format.read_magic(head)
    if version not in _HEADERS:
        raise ValueError(f"{name} has version {version} of the array format: only 1.0 and 2.0 are read")
    shape, by_columns, dtype = _HEADERS[version](head)
    if dtype.str in ("|V2", "<V2"):
        dtype = _BFLOAT16
    elif dtype.name not in _KINDS or not dtype.isnative:
        raise ValueError(f"{name} is {dtype}: only bfloat16, {', '.join(_KINDS)} are read")
    expected = head.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or expected != member.file_size:
        raise ValueError(f"{name} has {member.file_size} bytes: an array of {dtype} {shape} has {expected}")
    place = (path, name, (begin, member.file_size, member.CRC), begin + head.tell(), by_columns)

    def load() -> npt.NDArray[Any]:
        array._check()
        return array._values(0, shape[::-1]).T if by_columns else array._values(0, shape)

    array = NpzArray(shape, dtype, load, *place)
    return array


def write_npz(path: epath.PathLike, arrays: Mapping[str, Any]) -> None:
    """Write arrays, lazy or not, one at a time, as `np.savez` does; equal arrays give equal bytes."""
    with epath.Path(path).open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in arrays:
            value = np.asarray(arrays[name], order="C")
            if value.dtype == _BFLOAT16:
                value = value.view("V2")
            # A ZipInfo has a fixed date; a name would take that of the clock in some versions of Python.
            with archive.open(zipfile.ZipInfo(name + _SUFFIX), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)
