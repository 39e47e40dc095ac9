"""The input of a run: its data pipeline, restarted when workers die, and its batches, sent ahead to the devices."""

from __future__ import annotations

import collections
import concurrent.futures
import logging
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.pipeline import TrainIterator, TrainRow, train_iterator
from tclip_jax.data.sources import Source, digest, open_source
from tclip_jax.data.tokenizer import TextTokenizer
from tclip_jax.parallel.agreement import allgather_json, together
from tclip_jax.parallel.mesh import shard_batch
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.tokenizer import run_tokenizer

_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


def open_input(
    run: RunConfig,
    source: Source,
    workdir: epath.PathLike,
    mesh: Mesh,
    cache: TeacherCache | None = None,
    tokenizer: TextTokenizer | None = None,
) -> tuple[ResumableIterator, BadSamples]:
    """Return a run's batches as global arrays, and its record of bad samples. A collective.

    Each process writes a record of its own: bad_samples.jsonl, and bad_samples.p.jsonl for process p > 0.

    Raises:
      FileNotFoundError, ValueError: the data are missing, do not fit the configuration, or differ between processes.
    """
    process = jax.process_index()
    with together():
        content = digest(source)
    digests = allgather_json(content)
    if differing := next((i for i, each in enumerate(digests) if each != digests[0]), None):
        raise ValueError(
            f"{run.data.source}: process {differing} reads other data than process 0 (digest {digests[differing]}, not "
            f"{digests[0]}); give every process the same readable files (docs/data.md)"
        )
    name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
    bad = BadSamples(epath.Path(workdir) / name, run.data.max_bad_share, len(source))

    def start() -> DevicePrefetch:
        processes = {"process_index": process, "process_count": jax.process_count()}
        rows = train_data(run, source, tokenizer, **processes, cache=cache, bad=bad)
        return DevicePrefetch(rows, mesh)

    return ResumableIterator(start), bad


def train_data(
    run: RunConfig,
    source: Source | None = None,
    tokenizer: TextTokenizer | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    cache: TeacherCache | None = None,
    bad: BadSamples | None = None,
) -> TrainIterator:
    """Return `train_iterator` of a run's configuration, over `source` or the source that the configuration names.

    Without `tokenizer`, it is that of `run_tokenizer`.

    Raises:
      FileNotFoundError, ValueError: the data are missing or do not fit the configuration.
    """
    return train_iterator(
        open_source(run.data.source, run.data.split) if source is None else source,
        tokenizer=tokenizer or run_tokenizer(run),
        preprocess=run.preprocess,
        augment=run.data.augment,
        templates=run.data.templates,
        batch_size=run.data.batch_size,
        seed=run.seed,
        process_index=process_index,
        process_count=process_count,
        workers=run.data.workers,
        cache=cache,
        bad=bad,
    )


def draw_sample(run: RunConfig, source: Source, tokenizer: TextTokenizer) -> None:
    """Read and augment one record in this process; raise what the source or the augmentation raises."""
    row = TrainRow(source, tokenizer, run.preprocess, run.data.augment, run.data.templates)
    row.draw(0, np.random.default_rng(run.seed))


class ResumableIterator:
    """An endless iterator of batches that restarts its workers, at the same position, when one of them is killed.

    Attributes:
      position: the position after the last batch, as JSON values; another iterator over the same data can seek it.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._iterator = start()
        self.position = self._iterator.get_state()

    def seek(self, position: Any) -> None:
        """Move to a `position`."""
        self._iterator.set_state(position)
        self.position = position

    def __next__(self) -> dict[str, Any]:
        """Return the next batch; raise RuntimeError when workers are killed three times in a row."""
        for attempt in range(_ATTEMPTS):
            try:
                batch = next(self._iterator)
                break
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
                _logger.warning("a data worker was killed: restarting the workers")
                self._iterator.close()
                self._iterator = self._start()
                self.seek(self.position)
        self.position = self._iterator.get_state()
        return batch

    def close(self) -> None:
        """Stop the workers."""
        self._iterator.close()


class HostIterator(Protocol):
    """Batches of this process's rows, and a state that can be read and set."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class DevicePrefetch:
    """Batches as global arrays; a thread sends the next `depth` while the devices compute.

    The state belongs to the last batch that was yielded, not to those sent ahead.
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
        """Return the iterator's state after the last batch that was yielded."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drop the batches sent ahead and set the iterator's state."""
        self._drop()
        self._iterator.set_state(state)
        self._state, self._error = state, None

    def close(self) -> None:
        """Stop the thread and close the iterator."""
        self._drop()
        self._pool.shutdown()
        self._iterator.close()

    def _load(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        if self._error:
            raise self._error
        try:
            batch = shard_batch(next(self._iterator), self._mesh)
        except BaseException as error:
            self._error = error  # a failed iterator is not read again
            raise
        return batch, self._iterator.get_state()

    def _drop(self) -> None:
        for future in self._ahead:
            future.cancel()
        concurrent.futures.wait(self._ahead)
        self._ahead.clear()
