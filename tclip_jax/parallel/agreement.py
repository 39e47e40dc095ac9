"""Collectives on the host: JSON values, errors and stop requests that all processes of a run share."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_RAISED_BY_ALL = "(raised by all processes)"

_logger = logging.getLogger(__name__)


def allgather_json(value: Any) -> list[Any]:
    """Return the JSON value of every process, by process index, on all processes.

    A collective: every process must call it equally often and in the same order.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    # jax compiles a gather for each shape: powers of two keep the shapes few.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(error: Exception) -> Exception:
    """Mark an error that all processes raise at the same place, so that `distributed` shuts down in order."""
    error.add_note(_RAISED_BY_ALL)
    return error


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """Mark the errors of a block that all processes run with the same values, so that all raise the same error."""
    try:
        yield
    except Exception as error:
        agreed(error)
        raise


def is_agreed(error: BaseException) -> bool:
    """Whether `agreed` has marked the error."""
    return _RAISED_BY_ALL in getattr(error, "__notes__", ())


class FailedElsewhere(ValueError):
    """The error of another process, with its index and message."""


class FirstError:
    """The first error of this process, stored until all processes raise it together.

    Attributes:
      error: the error, or None.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Log and store an error of the block instead of raising it."""
        try:
            yield
        except Exception as error:
            self.store(error)

    def store(self, error: Exception) -> None:
        """Log and store `error`, unless an error is stored already."""
        if self.error is None:
            self.error = error
            _logger.error("%s", _line(error))

    def raise_everywhere(self) -> None:
        """If any process has stored an error, raise on every process: its own error, or `FailedElsewhere`.

        A collective: every process must call it equally often and in the same order.
        """
        lines = allgather_json(_line(self.error) if self.error else "")
        if self.error:
            raise agreed(self.error)
        for process, line in enumerate(lines):
            if line:
                raise agreed(FailedElsewhere(f"process {process}: {line}"))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run a block without collectives; if it raises on one process, all processes raise at its end. A collective."""
    failure = FirstError()
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        failure.error = error
    failure.raise_everywhere()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


class Agreement:
    """Element-wise maximum of a few integers over processes, returned one call late so that no host blocks.

    The devices reduce the values after the step that was dispatched last, and have finished by the next call. A single
    process gets its result one call late too: a run behaves alike on any number of processes.

    Args:
      mesh: the devices of all processes.
      count: how many integers each call takes.
    """

    def __init__(self, mesh: Mesh, count: int) -> None:
        self._count = count
        self._result: jax.Array | tuple[int, ...] = (0,) * count
        flat = Mesh(mesh.devices.reshape(-1), ("device",))
        self._sharding = NamedSharding(flat, PartitionSpec("device"))
        self._maximum = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(flat, PartitionSpec()))

    def all_hosts_max(self, values: Sequence[int]) -> tuple[int, ...]:
        """Contribute `values` (int32) and return the maximum of the previous call's values; zeros at first.

        A collective: every process must call it equally often and in the same order.
        """
        result = tuple(int(value) for value in np.asarray(self._result))
        if jax.process_count() == 1:
            self._result = tuple(values)
        else:
            rows = np.tile(np.array(values, np.int32), (jax.local_device_count(), 1))
            shape = (jax.device_count(), self._count)
            self._result = self._maximum(jax.make_array_from_process_local_data(self._sharding, rows, shape))
        return result
