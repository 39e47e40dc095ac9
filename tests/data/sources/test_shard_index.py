"""Indexes are made once and resume; the error of a damaged index is one line with the remedy."""

from __future__ import annotations

import json
import pathlib
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.data.sources import BadSample, shard_index
from tclip_jax.data.sources.shard_index import ShardIndex, write_sparse_index
from tclip_jax.data.sources.tars import Tars


def test_an_index_is_made_once_and_interrupted_indexing_resumes(
    own_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []

    def scan(path: str) -> shard_index.Scan:
        scanned.append(path)
        if len(scanned) == 3:
            raise KeyboardInterrupt
        return shard_index.Scan(100, 2)

    monkeypatch.setattr(shard_index.concurrent.futures, "ThreadPoolExecutor", Serial)
    shards = ["a", "b", "c", "d"]
    with pytest.raises(KeyboardInterrupt):
        shard_index.open_index("arrayrecord", shards, scan)
    index = shard_index.open_index("arrayrecord", shards, scan)
    assert scanned == ["a", "b", "c", "c", "d"] and len(index) == 8
    assert [index.locate(i) for i in (0, 3, 7)] == [(0, 0), (1, 1), (3, 1)]
    assert shard_index.open_index("arrayrecord", shards, scan).folder == index.folder and len(scanned) == 5
    (index.folder / "starts.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a complete index; delete the folder"):
        ShardIndex(index.folder)


def test_a_missing_shard_stops_the_indexing() -> None:
    scanned: list[str] = []

    def scan(path: str) -> shard_index.Scan:
        scanned.append(path)
        if path == "store://0":
            raise FileNotFoundError(path)
        time.sleep(0.01)
        return shard_index.Scan(1, 1)

    with pytest.raises(FileNotFoundError):
        shard_index.open_index("arrayrecord", [f"store://{i}" for i in range(10_000)], scan)
    assert len(scanned) < 5_000


def test_names_of_shards_may_have_any_character_except_a_line_feed() -> None:
    shards = ["a\u2028b", "c\x85", "d\x0be"]
    assert shard_index.open_index("arrayrecord", shards, lambda path: shard_index.Scan(1, 1)).shards == shards


class Serial:
    """A pool that runs each task when it is submitted."""

    def __init__(self, workers: int) -> None:
        del workers

    def __enter__(self) -> Serial:
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: object) -> None: ...

    def map(self, function: Any, each: Any) -> Any:
        return map(function, each)

    def submit(self, function: Any, *arguments: Any) -> Any:
        future: Any = shard_index.concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any))
def test_locate_returns_shard_and_row(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    tmp = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLIP_CACHE_DIR", str(tmp))
        index = shard_index.open_index(
            "arrayrecord", [str(i) for i in range(len(counts))], lambda path: shard_index.Scan(1, counts[int(path)])
        )
    expected = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    assert [index.locate(i) for i in range(len(index))] == expected


def test_a_sparse_index_of_any_size(tmp_path: pathlib.Path) -> None:
    write_sparse_index(tmp_path / "sparse", shards=300, samples=1_000_000)
    source = Tars(ShardIndex(tmp_path / "sparse"))
    assert len(source) == 300_000_000 and (tmp_path / "sparse" / "samples.bin").stat().st_blocks < 100
    with pytest.raises(BadSample, match=r"/nowhere/000299\.tar/999999: no image"):
        source[299_999_999]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    write_sparse_index(tmp_path / "index", shards=3, samples=4)
    assert len(ShardIndex(tmp_path / "index")) == 12
    return tmp_path / "index"


def refused(folder: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="not a complete index") as raised:
        ShardIndex(folder)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("key", ["samples", "version", "passed_over"])
@pytest.mark.parametrize("value", [None, -1, 10**30, "12", [12], {"kinds": True}])
def test_a_manifest_with_invalid_values_is_refused(key: str, value: Any, folder: pathlib.Path) -> None:
    about = json.loads((folder / "index.json").read_text()) | {key: value}
    (folder / "index.json").write_text(json.dumps(about))
    refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"version": 1}', "\x1b[2J"])
def test_an_invalid_manifest_is_refused(text: str, folder: pathlib.Path) -> None:
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
def test_invalid_arrays_are_refused(name: str, array: Any, folder: pathlib.Path) -> None:
    np.save(folder / f"{name}.npy", array)
    refused(folder)


@pytest.mark.parametrize(
    "header", ["{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }", "{'descr': (", "[" * 300]
)
def test_the_header_of_an_array_allocates_nothing(header: str, folder: pathlib.Path) -> None:
    """tests/fuzz showed that a header may claim a tebibyte, and that a damaged one raises the errors of a tokenizer."""
    text = header.encode() + b"\n"
    (folder / "sizes.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24))
    tracemalloc.start()
    refused(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
