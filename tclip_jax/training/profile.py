"""A trace of chosen steps, for xprof (TensorBoard's profile plugin)."""

from __future__ import annotations

import logging
import os
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

_logger = logging.getLogger(__name__)


class Trace:
    """Traces process 0 from the beginning of the first to the end of the last of `steps` into `<workdir>/profile`.

    A context manager: a run that ends between them keeps what there is.
    """

    def __init__(self, workdir: epath.PathLike, steps: tuple[int, ...]) -> None:
        self._folder, self._running = epath.Path(workdir) / "profile", False
        self._first, self._last = steps if steps and jax.process_index() == 0 else (0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
        except Exception as failure:
            if error is None:
                raise
            _logger.error("%s: the trace could not be written: %s", self._folder, failure)  # the run's own error counts

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(os.fspath(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any) -> None:
        """To be called after; at the last step it waits for the metrics."""
        if self._running and step == self._last:
            jax.block_until_ready(metrics)
            self.__exit__(None, None, None)
