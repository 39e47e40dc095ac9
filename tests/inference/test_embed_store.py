from __future__ import annotations

import pathlib

import numpy as np
import pytest

from tclip_jax.inference.embed import Store, chunked

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)


def test_rows_come_back_by_key_in_another_process(tmp_path: pathlib.Path) -> None:
    store = Store(tmp_path / "s", 3)
    assert not (tmp_path / "s").exists()
    store.add(["a", "b"], ROWS[:2])
    again = Store(tmp_path / "s", 3)
    again.add(["c", "d"], ROWS[2:])
    for each in (again, Store(tmp_path / "s", 3)):
        np.testing.assert_array_equal(np.stack([each.row(key) for key in "dcba"]), ROWS[::-1])
        assert "a" in each and "e" not in each
    assert "c" not in store
    again.remove()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", None])
def test_parts_that_cannot_be_read_count_as_absent(tmp_path: pathlib.Path, content: bytes | None) -> None:
    store = Store(tmp_path, 3)
    store.add(["a"], ROWS[:1])
    store.add(["b"], ROWS[1:2])
    part = tmp_path / "00000000.npz"
    part.write_bytes(part.read_bytes()[:-40] if content is None else content)
    again = Store(tmp_path, 3)
    assert "a" not in again and "b" in again
    again.add(["a"], ROWS[:1])
    np.testing.assert_array_equal(Store(tmp_path, 3).row("a"), ROWS[0])


def test_rows_of_another_width_count_as_absent(tmp_path: pathlib.Path) -> None:
    Store(tmp_path, 3).add(["a"], ROWS[:1])
    assert "a" not in Store(tmp_path, 4)


def test_pickles_are_not_loaded(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "00000000.npz", keys=np.array([{"a": 1}], object), embeddings=ROWS[:1])
    assert "a" not in Store(tmp_path, 3)


@pytest.mark.parametrize("count", [0, 1, 4096, 4097])
def test_chunks_hold_every_row(count: int) -> None:
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    chunks = list(chunked(iter(rows), 2))
    assert all(0 < len(chunk) <= 4096 for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2), np.float32), *chunks]), rows)
