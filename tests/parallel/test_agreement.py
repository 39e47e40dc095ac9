"""What processes agree on: the largest that any asked for, one question later."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.parallel.agreement import Agreement
from tclip_jax.parallel.mesh import make_mesh


def test_an_answer_comes_with_the_next_question() -> None:
    agreement = Agreement(make_mesh(), 2)
    assert [agreement.all_hosts_max(values) for values in ((0, 1), (75, 0), (0, 0))] == [(0, 0), (0, 1), (75, 0)]


@pytest.mark.parametrize("others", [(75, 0, 7), (0, 1, 2), (0, 0, 0)])
def test_what_any_of_two_processes_asks_for_is_answered(
    others: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the eight devices the last four are another process's, which asks for `others`."""
    own = (0, 1, 3)

    def two_processes(sharding: Any, rows: np.ndarray, shape: tuple[int, int]) -> jax.Array:
        assert rows.shape == shape == (8, 3) and np.array_equal(rows, np.tile(own, (8, 1)))
        return jax.device_put(np.concatenate([rows[:4], np.tile(np.int32(others), (4, 1))]), sharding)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", two_processes)
    agreement = Agreement(make_mesh(), 3)
    assert agreement.all_hosts_max(own) == (0, 0, 0)
    assert agreement.all_hosts_max(own) == tuple(map(max, own, others))
