"""Files are exchanged with the safetensors library in both directions."""

from __future__ import annotations

import hashlib
import json
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.artifacts.safetensors import LazyArray, read_safetensors, write_safetensors


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes = ("float32", "float16", "bfloat16", "uint8", "int64", "float64", "int8", "bool")
    found = {f"{i}/{dtype}": rng.integers(0, 2, (i, 3)).astype(jnp.dtype(dtype)) for i, dtype in enumerate(dtypes)}
    return found | {"b": np.array(2.5, np.float32), "a": rng.random(5, np.float32)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_writes_the_bytes_of_the_library(metadata: dict[str, str] | None, tmp_path: pathlib.Path) -> None:
    entry = write_safetensors(tmp_path / "f", arrays(), metadata)
    data = (tmp_path / "f").read_bytes()
    assert data == safetensors.numpy.save(arrays(), metadata)
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_reads_what_the_library_writes(tmp_path: pathlib.Path) -> None:
    safetensors.numpy.save_file(arrays(), tmp_path / "f", {"format": "pt"})
    tensors = read_safetensors(tmp_path / "f")
    assert tensors.keys() == arrays().keys()
    for name, value in arrays().items():
        assert (tensors[name].shape, tensors[name].dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(np.asarray(tensors[name]), value)


def test_lazy_tensors_are_read_once_and_in_their_turn(tmp_path: pathlib.Path) -> None:
    read: list[str] = []

    def lazy(name: str) -> LazyArray:
        def load() -> np.ndarray:
            read.append(name)
            return np.full(3, len(name), np.float32)

        return LazyArray((3,), np.dtype(np.float32), load)

    write_safetensors(tmp_path / "f", {name: lazy(name) for name in ("ccc", "a", "bb")})
    assert read == ["a", "bb", "ccc"]
    assert safetensors.numpy.load_file(tmp_path / "f")["bb"].tolist() == [2, 2, 2]


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def _with_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a safetensors file: its 0 bytes"),
        (b"PK\x03\x04 something else", "truncated or not a safetensors file"),
        (safetensors.numpy.save({"a": np.ones(4, np.float32)})[:-1], "it has 79 bytes, its header states 80"),
        (safetensors.numpy.save({"a": np.ones(4, np.float32)}) + b"x", "it has 81 bytes, its header states 80"),
        (_with_header([]), "bad header"),
        (_with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "cannot be F32"),
        (_with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, bytes(4)), "cannot be F32"),
        (_with_header({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"x"), "F8_E4M3"),
        (_with_header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets"),
        (_with_header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)), "cannot be F32"),
        (_with_header(dict.fromkeys("ab", FOUR), bytes(4)), "b starts at byte 0: the previous tensor ends at 4"),
        (
            _with_header({"a": FOUR | {"data_offsets": [4, 8]}}, bytes(8)),
            "a starts at byte 4: the previous tensor ends at 0",
        ),
        (_with_header({"a": FOUR, "A": FOUR}, bytes(4)).replace(b'"A"', b'"a"'), "'a' is duplicated"),
        (struct.pack("<Q", 10**5) + b"[" * 10**5, "bad header: maximum recursion depth exceeded"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"w\.safetensors is .*{message}") as raised:
        read_safetensors(tmp_path / "w.safetensors")
    assert "\n" not in str(raised.value)
