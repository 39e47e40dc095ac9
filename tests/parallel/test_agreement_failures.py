"""What fails on one process is raised by all: there as it was, elsewhere with the name of the process."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest

from tclip_jax.parallel import agreement as failures
from tclip_jax.parallel.agreement import FailedElsewhere, Failure, together


def gathered(monkeypatch: pytest.MonkeyPatch, *others: str) -> list[Any]:
    """This process is the first of several, of which the others say `others`; returns what this one says."""
    said: list[Any] = []

    def gather(value: Any) -> list[Any]:
        said.append(value)
        return [value, *others]

    monkeypatch.setattr(failures, "allgather_json", gather)
    monkeypatch.setattr(failures.jax, "process_count", lambda: 1 + len(others))
    return said


def test_the_first_error_is_logged_at_once_kept_and_raised(caplog: pytest.LogCaptureFixture) -> None:
    failure, first = Failure(), OSError(28, "No space left on device", "metrics.jsonl")
    failure.raise_everywhere()
    for error in (first, ValueError("a consequence")):
        with failure.kept():
            raise error
    assert [record.getMessage() for record in caplog.records] == [str(first)]
    assert caplog.records[0].levelno == logging.ERROR and failure.error is first
    with pytest.raises(OSError, match="No space left") as raised:
        failure.raise_everywhere()
    assert raised.value is first
    with pytest.raises(KeyboardInterrupt), failure.kept():
        raise KeyboardInterrupt


def test_what_another_process_raised_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said = gathered(monkeypatch, "", "no such shard")
    with pytest.raises(FailedElsewhere, match=r"^process 2: no such shard"):
        Failure().raise_everywhere()
    assert said == [""] and issubclass(FailedElsewhere, ValueError)  # so that the exit code is 2


@pytest.mark.parametrize("error", [ValueError("two\nlines"), RuntimeError("a bug")])
def test_a_block_is_left_by_all_or_by_none(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    said = gathered(monkeypatch, "")
    with together():
        pass
    with contextlib.suppress(type(error)), together():
        raise error
    assert said == ["", "two lines" if isinstance(error, ValueError) else "RuntimeError: a bug"]
    gathered(monkeypatch, "no such folder")
    with pytest.raises(FailedElsewhere, match="process 1: no such folder"), together():
        pass
    with pytest.raises(type(error)), together():  # its own reason comes first
        raise error
