"""Batches on the devices before the step that wants them."""

from __future__ import annotations

import collections
import concurrent.futures
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh

from tclip_jax.parallel.mesh import shard_batch


class HostIterator(Protocol):
    """Batches of this process's rows, with a state that can be set."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class DevicePrefetch:
    """The batches of an iterator as global arrays; the next `depth` are sent while the devices compute.

    The state is that of what was yielded, not of what was sent ahead.
    """

    def __init__(self, iterator: HostIterator, mesh: Mesh, depth: int = 2) -> None:
        self._iterator, self._mesh, self._depth = iterator, mesh, depth
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        self._ahead: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
        self._state = iterator.get_state()
        self._error: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(self._load))
        batch, self._state = self._ahead.popleft().result()
        self._ahead.append(self._pool.submit(self._load))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The iterator's state after the last batch that was yielded."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drops what was sent ahead and goes on as the iterator does."""
        self._drop()
        self._iterator.set_state(state)
        self._state, self._error = state, None

    def close(self) -> None:
        """Ends the thread, and the iterator."""
        self._drop()
        self._pool.shutdown()
        self._iterator.close()

    def _load(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        if self._error:
            raise self._error
        try:
            batch = shard_batch(next(self._iterator), self._mesh)
        except BaseException as error:
            self._error = error  # nothing more is asked of an iterator that has failed
            raise
        return batch, self._iterator.get_state()

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        concurrent.futures.wait(self._ahead)
        self._ahead.clear()
