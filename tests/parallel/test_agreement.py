"""Processes agree on the maximum of their values, and all raise the error of one."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.parallel import agreement
from tclip_jax.parallel.agreement import Agreement, FailedElsewhere, FirstError, together
from tclip_jax.parallel.mesh import make_mesh


def test_the_maximum_comes_with_the_next_call() -> None:
    agreement = Agreement(make_mesh(), 2)
    assert [agreement.all_hosts_max(values) for values in ((0, 1), (75, 0), (0, 0))] == [(0, 0), (0, 1), (75, 0)]


@pytest.mark.parametrize("remote", [(75, 0, 7), (0, 1, 2), (0, 0, 0)])
def test_the_maximum_is_over_both_processes(remote: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last four of the eight devices belong to another process, whose values are `remote`."""
    local = (0, 1, 3)

    def two_processes(sharding: Any, rows: np.ndarray, shape: tuple[int, int]) -> jax.Array:
        assert rows.shape == shape == (8, 3) and np.array_equal(rows, np.tile(local, (8, 1)))
        return jax.device_put(np.concatenate([rows[:4], np.tile(np.int32(remote), (4, 1))]), sharding)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", two_processes)
    agreement = Agreement(make_mesh(), 3)
    assert agreement.all_hosts_max(local) == (0, 0, 0)
    assert agreement.all_hosts_max(local) == tuple(map(max, local, remote))


def gathered(monkeypatch: pytest.MonkeyPatch, *remote: str) -> list[Any]:
    """Makes this process 0 of several, whose other messages are `remote`; returns the messages that it sends."""
    sent: list[Any] = []

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        return [value, *remote]

    monkeypatch.setattr(agreement, "allgather_json", gather)
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 1 + len(remote))
    return sent


def test_the_first_error_is_logged_at_once_and_raised_later(caplog: pytest.LogCaptureFixture) -> None:
    failure, first = FirstError(), OSError(28, "No space left on device", "metrics.jsonl")
    failure.raise_everywhere()
    for error in (first, ValueError("a consequence")):
        with failure.captured():
            raise error
    assert [record.getMessage() for record in caplog.records] == [str(first)]
    assert caplog.records[0].levelno == logging.ERROR and failure.error is first
    with pytest.raises(OSError, match="No space left") as raised:
        failure.raise_everywhere()
    assert raised.value is first
    with pytest.raises(KeyboardInterrupt), failure.captured():
        raise KeyboardInterrupt


def test_the_error_of_another_process_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = gathered(monkeypatch, "", "no such shard")
    with pytest.raises(FailedElsewhere, match=r"^process 2: no such shard"):
        FirstError().raise_everywhere()
    assert sent == [""] and issubclass(FailedElsewhere, ValueError)  # so that the exit code is 2


@pytest.mark.parametrize("error", [ValueError("two\nlines"), RuntimeError("a bug")])
def test_a_block_raises_on_all_processes_or_on_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = gathered(monkeypatch, "")
    with together():
        pass
    with contextlib.suppress(type(error)), together():
        raise error
    assert sent == ["", "two lines" if isinstance(error, ValueError) else "RuntimeError: a bug"]
    gathered(monkeypatch, "no such folder")
    with pytest.raises(FailedElsewhere, match="process 1: no such folder"), together():
        pass
    with pytest.raises(type(error)), together():  # a process raises its own error first
        raise error
