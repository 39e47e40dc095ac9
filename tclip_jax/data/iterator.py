"""An endless iterator of batches whose state is one number: how far it is in the global order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import grain
import numpy as np
from absl import flags

from tclip_jax import keys
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.sources import FAULTS

Batch = dict[str, np.ndarray]

NAME_BYTES, REASON_BYTES = 256, 160


class TrainIterator(Iterator[Batch]):
    """This process's share of each global batch, from an endless global order of rows.

    The state is that of what was yielded, whatever was prepared ahead, by threads or by worker processes. It says
    nothing of processes, workers or the size of a batch: any of them may be another when it is set.

    Args:
      rows: the global order.
      made_of: the seed and the content of the source: what the state belongs to; asked for when the state is.
      batch_size: rows over all processes.
      process_index, process_count: which share is this one.
      workers, threads, prefetch: as of `train_iterator`.
      bad: is told of every bad sample of this process's share.
    """

    def __init__(
        self,
        rows: grain.MapDataset,
        *,
        made_of: Callable[[], keys.Recipe],
        batch_size: int,
        process_index: int,
        process_count: int,
        workers: int,
        threads: int,
        prefetch: int,
        bad: BadSamples,
    ) -> None:
        self._rows, self._made_of, self._batch_size = rows, functools.cache(made_of), batch_size
        self._process_index, self._process_count = process_index, process_count
        self._workers, self._options = workers, grain.ReadOptions(threads, max(threads, prefetch))
        self._bad = bad
        self._samples = 0
        self._batches: Iterator[Any] | None = None  # made by the first `next`: workers start once, where they must

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        batch = next(self._batches)
        self._samples += self._batch_size
        names, reasons = batch.pop("name"), batch.pop("reason")
        for row in np.flatnonzero(batch["fault"]):
            name, reason = (bytes(each[row]).decode("utf-8", "replace") for each in (names, reasons))
            self._bad.add(FAULTS[batch["fault"][row]], name, reason)
        return batch

    def get_state(self) -> dict[str, Any]:
        """How many rows of the global order were yielded over all processes, and of which data; JSON."""
        return {"samples": self._samples, "data": self._made_of()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after the rows that `state` says.

        Raises:
          ValueError: it is the state of other data, of another seed, or of an older version.
        """
        if not isinstance(state, dict) or "samples" not in state or not isinstance(state.get("data"), dict):
            raise ValueError(
                f'the place in the data is {str(state)[:80]} where {{"samples": …, "data": {{…}}}} is expected: an '
                "older version wrote it, without the data's content; start a new run from its weights by config.init"
            )
        if differs := keys.difference(state["data"], self._made_of()):
            raise ValueError(
                f"the data are not those of the checkpoint ({differs}): give it those, or start a new run from its "
                "weights by config.init"
            )
        self.close()
        self._samples = state["samples"]

    def close(self) -> None:
        """Ends the worker processes."""
        close: Callable[[], None] | None = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._batches = None

    def _start(self) -> Iterator[Any]:
        share = self._rows[self._samples + self._process_index :: self._process_count]
        dataset = share.batch(self._batch_size // self._process_count).to_iter_dataset(self._options)
        if self._workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers refuse to start otherwise
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(dataset)
