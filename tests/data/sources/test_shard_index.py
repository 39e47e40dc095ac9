"""A damaged index in the cache folder is one line that says what to do, whatever is damaged."""

from __future__ import annotations

import json
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tclip_jax.data.sources.shard_index import ShardIndex, write_sparse_index


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    write_sparse_index(tmp_path / "index", shards=3, samples=4)
    assert len(ShardIndex(tmp_path / "index")) == 12
    return tmp_path / "index"


def refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="not a whole index") as raised:
        ShardIndex(folder)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("key", ["samples", "version", "passed_over"])
@pytest.mark.parametrize("value", [None, -1, 10**30, "12", [12], {"kinds": True}])
def test_a_document_of_other_types(key: str, value: Any, folder: pathlib.Path) -> None:
    about = json.loads((folder / "index.json").read_text()) | {key: value}
    (folder / "index.json").write_text(json.dumps(about))
    refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"version": 1}', "\x1b[2J"])
def test_a_document_that_is_none(text: str, folder: pathlib.Path) -> None:
    (folder / "index.json").write_text(text)
    refused(folder)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("starts", np.zeros(4, np.int64)),
        ("starts", np.array([0, 8, 4, 12])),
        ("starts", np.array([0, 4, 8, 12], np.float64)),
        ("starts", np.array([1, 4, 8, 12])),
        ("sizes", np.zeros(2, np.int64)),
        ("faults", np.full(3, 255, np.uint8)),
        ("faults", np.zeros((3, 1), np.uint8)),
    ],
)
def test_arrays_that_cannot_be_right(name: str, array: Any, folder: pathlib.Path) -> None:
    np.save(folder / f"{name}.npy", array)
    refused(folder)


@pytest.mark.parametrize(
    "header", ["{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }", "{'descr': (", "[" * 300]
)
def test_a_header_of_numpy_allocates_nothing(header: str, folder: pathlib.Path) -> None:
    """Found by tests/fuzz: a header may promise a tebibyte, and a broken one raises what a tokenizer raises."""
    text = header.encode() + b"\n"
    (folder / "sizes.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    tracemalloc.start()
    refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
