"""Resumable batches: restarts of killed workers, and the state of batches that are sent ahead."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.parallel.mesh import batch_sharding, make_mesh
from tclip_jax.training.input import DevicePrefetch, ResumableIterator


class Counter:
    """Batches of the numbers 0, 1, …; the fifth cannot be read."""

    def __init__(self) -> None:
        self.next, self.closed = 0, False

    def __next__(self) -> dict[str, np.ndarray]:
        if self.next == 5:
            raise OSError("broken")
        self.next += 1
        return {"x": np.full(8, self.next - 1)}

    def get_state(self) -> dict[str, Any]:
        return {"next": self.next}

    def set_state(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def close(self) -> None:
        self.closed = True


def test_the_state_is_that_of_the_last_yielded_batch() -> None:
    counter, mesh = Counter(), make_mesh()
    ahead = DevicePrefetch(counter, mesh)
    assert ahead.get_state() == {"next": 0}
    for i in range(2):
        batch = next(ahead)
        assert isinstance(batch["x"], jax.Array) and batch["x"].sharding == batch_sharding(mesh)
        assert batch["x"].tolist() == [i] * 8 and ahead.get_state() == {"next": i + 1}
    ahead.set_state({"next": 1})
    assert ahead.get_state() == {"next": 1}
    assert [int(next(ahead)["x"][0]) for _ in range(4)] == [1, 2, 3, 4]
    assert counter.next == 5  # an error ahead is raised with its batch
    with pytest.raises(OSError, match="broken"):
        next(ahead)
    ahead.close()
    assert counter.closed


class Mortal:
    """Batches 1, 2, …; the worker is killed after `lives[0]` of them, and the next start takes the next entry."""

    def __init__(self, lives: list[int]) -> None:
        self._next, self._lives = 0, lives.pop(0) if lives else 10**9

    def __next__(self) -> int:
        if not self._lives:
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")
        self._lives -= 1
        self._next += 1
        return self._next

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["next"]

    def close(self) -> None: ...


def test_batches_continue_after_a_worker_was_killed() -> None:
    lives = [2, 0]
    batches = ResumableIterator(lambda: Mortal(lives))
    assert [next(batches) for _ in range(5)] == [1, 2, 3, 4, 5] and batches.position == {"next": 5}
    batches.seek({"next": 70})
    assert next(batches) == 71
    lives = [1, 0, 0, 0]
    batches = ResumableIterator(lambda: Mortal(lives))
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        [next(batches) for _ in range(2)]
