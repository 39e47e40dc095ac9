from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.parallel.mesh import batch_sharding, make_mesh
from tclip_jax.training.input import DevicePrefetch


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


def test_the_state_is_of_what_was_yielded() -> None:
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
    assert counter.next == 5  # an error ahead is raised when its batch is asked for
    with pytest.raises(OSError, match="broken"):
        next(ahead)
    ahead.close()
    assert counter.closed
