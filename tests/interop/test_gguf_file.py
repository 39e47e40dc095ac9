from __future__ import annotations

import io
import pathlib
import struct
from typing import Any

import gguf
import numpy as np
import pytest

from tclip_jax.interop.gguf_file import Tensor, read_header, write_file

METADATA: dict[str, Any] = {
    "general.architecture": "clip",
    "flag": True,
    "count": 7,
    "half": 0.5,
    "words": ["ein", "Wört", ""],
    "mean": (0.25, 0.5),
}
TENSORS = {
    "a": Tensor("F32", (2, 3)),
    "b": Tensor("TQ1_0", (1, 512)),
    "c": Tensor("F16", (5,)),
    "d": Tensor("TQ2_0", (2, 256)),
}


def contents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    raw = [rng.integers(0, 256, (1, 108), np.uint8), rng.integers(0, 256, (2, 66), np.uint8)]
    return [np.arange(6, dtype=np.float32), raw[0], np.arange(5, dtype=np.float16), raw[1]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("gguf") / "file.gguf"
    write_file(path, METADATA, TENSORS, contents())
    return path


def read(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return read_header(io.BytesIO(data), len(data), "clip")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


CLIP = string("general.architecture") + struct.pack("<I", 8) + string("clip")


def header(fields: bytes = CLIP, tensors: bytes = b"", counts: tuple[int, int] = (0, 1), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + fields + tensors


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def one(*arguments: Any, data: int = 1024) -> bytes:
    """Return a file with one tensor and the given number of data bytes."""
    head = header(tensors=tensor(*arguments), counts=(1, 1))
    return head + bytes(-len(head) % 32 + data)


def test_what_is_written_is_read(path: pathlib.Path) -> None:
    data = path.read_bytes()
    metadata, tensors = read(data)
    assert list(metadata) == list(METADATA)
    for key, value in METADATA.items():
        assert list(metadata[key]) == list(value) if key == "mean" else metadata[key] == value
    assert {name: found._replace(offset=0) for name, found in tensors.items()} == TENSORS
    for found, content in zip(tensors.values(), contents(), strict=True):
        assert data[found.offset : found.offset + found.nbytes] == content.tobytes()
        assert found.offset % 32 == 0
    assert len(data) % 32 == 0


def test_the_gguf_package_reads_the_same(path: pathlib.Path) -> None:
    theirs = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        field = theirs.get_field(key)
        assert field and field.contents() == (list(value) if key == "mean" else value)
    for found, (name, (kind, shape, _)), content in zip(theirs.tensors, TENSORS.items(), contents(), strict=True):
        assert (found.name, found.tensor_type.name, found.shape.tolist()) == (name, kind, list(reversed(shape)))
        np.testing.assert_array_equal(found.data.reshape(-1), content.reshape(-1))


def test_every_type_of_value_of_the_gguf_package_is_read(tmp_path: pathlib.Path) -> None:
    numbers = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -1, "uint32": 2**32 - 1, "int32": -(2**31)}
    numbers |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.25, "float64": 0.1}
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "clip")
    for name, number in numbers.items():
        getattr(writer, f"add_{name}")(name, number)
    writer.add_bool("no", False)
    writer.add_array("strings", ["a", "ß"])
    writer.add_array("floats", [1.5, -2.0])
    writer.add_custom_alignment(64)
    writer.add_tensor("x", np.arange(3, dtype=np.float32))
    writer.add_tensor("y", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = (tmp_path / "file.gguf").read_bytes()
    metadata, tensors = read(data)
    assert {name: metadata[name] for name in numbers} == numbers
    assert metadata["no"] is False and metadata["strings"] == ["a", "ß"]
    np.testing.assert_array_equal(metadata["floats"], np.float32([1.5, -2]))
    assert tensors["y"].offset - tensors["x"].offset == 64
    assert np.frombuffer(data, "<f2", 4, tensors["y"].offset).tolist() == [0, 1, 2, 3]


def test_a_file_cut_anywhere_is_truncated(path: pathlib.Path) -> None:
    data = path.read_bytes()
    end = read(data)[1]["d"]
    for length in range(4, end.offset + end.nbytes):
        with pytest.raises(ValueError, match="truncated"):
            read(data[:length])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file: it must start with the bytes GGUF"),
        (header(version=1), "the GGUF version is 1: only 2 and 3, little-endian"),
        (header(version=3 << 24), "the GGUF version is 50331648"),
        (header(counts=(0, 2**64 - 1)), "truncated"),
        (header(counts=(2**64 - 1, 1)), "truncated"),
        (header(b"", counts=(0, 0)), "the architecture is None: only 'clip' can be read"),
        (header(CLIP.replace(b"clip", b"bert")), "the architecture is 'bert': only 'clip' can be read"),
        (header(CLIP + CLIP, counts=(0, 2)), "general.architecture is duplicated"),
        (header(struct.pack("<Q", 2**64 - 1)), "truncated: 18446744073709551615 bytes should follow byte 32"),
        (header(struct.pack("<Q", 3) + b"\xff\xff\xff"), "'utf-8' codec can't decode"),
        (header(string("a\nb") + bytes(20)), r"a name of 3 characters starts with 'a\\nb'"),
        (header(string("k" * 128) + bytes(20)), "a name of 128 characters"),
        (header(string("k") + struct.pack("<I", 99)), "k has the unknown value type 99"),
        (header(string("k") + struct.pack("<IIQ", 9, 4, 2**63) + bytes(8)), "truncated"),
        (header(string("k") + struct.pack("<IIQ", 9, 8, 2**63) + bytes(8)), "truncated"),
        (header(string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(8)), "k is an array of value type 9"),
        (header(CLIP + string("general.alignment") + struct.pack("<II", 4, 24), counts=(0, 2)), "alignment is 24"),
        (header(CLIP + string("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 2)), "alignment is 0"),
        (one("x", (4,) * 5, 0, 0), "tensor x has 5 axes: at most 4"),
        (one("x", (256,), 12, 0), "tensor x has type Q4_K: only F32, F16, TQ1_0, TQ2_0 can be read"),
        (one("x", (256,), 30, 0), "tensor x has type BF16"),
        (one("x", (256,), 77, 0), "tensor x has type number 77"),
        (one("x", (255, 256), 34, 0), r"tensor x is TQ1_0 with rows of 255"),
        (one("x", (), 35, 0), "tensor x is TQ2_0 with rows of 1"),
        (one("x", (257,), 0, 0), "truncated: tensor x ends at byte"),
        (one("x", (2**63, 2**63), 0, 0), "truncated: tensor x ends at byte"),
        (one("x", (4,), 0, 2**64 - 32), "truncated: tensor x ends at byte"),
        (one("x", (4,), 0, 16), "it must be a multiple of 32"),
        (
            header(tensors=tensor("x", (16,), 0, 0) + tensor("y", (16,), 0, 32), counts=(2, 1)) + bytes(512),
            "tensor y starts at byte 192: the previous tensor ends at 224",
        ),
        (
            header(tensors=tensor("x", (16,), 0, 0) + tensor("x", (16,), 0, 64), counts=(2, 1)) + bytes(512),
            "x is duplicated",
        ),
    ],
)
def test_hostile_files_are_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
