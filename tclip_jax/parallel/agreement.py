"""What all processes of a run know together: values, errors, and what any of them asks for."""

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


def allgather_json(value: Any) -> list[Any]:
    """The JSON value of each process, in their order, on all of them.

    A collective: every process must call it, as often as the others and in the same order.
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    # A power of two: each new shape is compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(data)] = data
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]


_logger = logging.getLogger(__name__)


_EVERYWHERE = "(raised by all processes)"


def agreed(error: Exception) -> Exception:
    """Notes that all processes raise this error, or one for it, at the same place: `distributed` then ends in order."""
    error.add_note(_EVERYWHERE)
    return error


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """A block whose errors every process raises, since all judge by the same numbers."""
    try:
        yield
    except Exception as error:
        agreed(error)
        raise


def is_agreed(error: BaseException) -> bool:
    """Whether `agreed` was told of it."""
    return _EVERYWHERE in getattr(error, "__notes__", ())


class FailedElsewhere(ValueError):
    """What another process raised."""


class Failure:
    """The first error of this process, kept until all processes raise it together.

    Attributes:
      error: None as long as nothing failed.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Logs and keeps what the block raises."""
        try:
            yield
        except Exception as error:
            self.keep(error)

    def keep(self, error: Exception) -> None:
        """Logs and keeps an error, unless there was one before."""
        if self.error is None:
            self.error = error
            _logger.error("%s", _line(error))

    def raise_everywhere(self) -> None:
        """Raises on every process if any has failed: there what it kept, elsewhere `FailedElsewhere`.

        A collective: every process must call it, as often as the others and in the same order.
        """
        lines = allgather_json(_line(self.error) if self.error else "")
        if self.error:
            raise agreed(self.error)
        for process, line in enumerate(lines):
            if line:
                raise agreed(FailedElsewhere(f"process {process}: {line}"))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that holds no collective: what one process raises in it, all raise at its end. A collective itself."""
    failure = Failure()
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
    """Element-wise maximum over processes of a few integers, returned one call late so that no host blocks.

    The reduction runs on the devices behind the step that was dispatched before it, and is done by the next call. A
    single process delays its answer in the same way, so that a run behaves alike on any number of processes.
    """

    def __init__(self, mesh: Mesh, count: int) -> None:
        self._count = count
        self._answer: jax.Array | tuple[int, ...] = (0,) * count
        flat = Mesh(mesh.devices.reshape(-1), ("everyone",))
        self._sharding = NamedSharding(flat, PartitionSpec("everyone"))
        self._largest = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(flat, PartitionSpec()))

    def all_hosts_max(self, values: Sequence[int]) -> tuple[int, ...]:
        """Contributes `values` (int32) and returns the maximum of the previous call's values; zeros at first.

        A collective: every process must call it, as often as the others and in the same order.
        """
        answer = tuple(int(each) for each in np.asarray(self._answer))
        if jax.process_count() == 1:
            self._answer = tuple(values)
        else:
            rows = np.tile(np.array(values, np.int32), (jax.local_device_count(), 1))
            shape = (jax.device_count(), self._count)
            self._answer = self._largest(jax.make_array_from_process_local_data(self._sharding, rows, shape))
        return answer
