"""The batches of a run on its devices, their place in the data, and the bad samples among them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.iterator import TrainIterator
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import Source, digest, open_source
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.parallel.agreement import allgather_json, together
from tclip_jax.parallel.prefetch import DevicePrefetch
from tclip_jax.runs.config import RunConfig


def train_data(
    run: RunConfig,
    source: Source | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
    cache: TeacherCache | None = None,
    bad: BadSamples | None = None,
) -> TrainIterator:
    """The iterator of a run's batches: this process's share of each, see `train_iterator`; of `source` if it is open.

    Raises:
      FileNotFoundError, ValueError: there is no such data, or it does not fit the configuration.
    """
    return train_iterator(
        open_source(run.data.source, run.data.split) if source is None else source,
        tokenizer=Tokenizer(run.model.text.context_length),
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


_ATTEMPTS = 3

_logger = logging.getLogger(__name__)


class ResumableIterator:
    """An endless iterator of batches that starts its workers again, at the same place, when one of them was killed.

    Attributes:
      position: JSON values that say which batch is next, from one iterator to another.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._iterator = start()
        self.position = self._iterator.get_state()

    def seek(self, position: Any) -> None:
        """Goes to a place that was a `position`."""
        self._iterator.set_state(position)
        self.position = position

    def __next__(self) -> dict[str, Any]:
        """Raises what reading raises, and RuntimeError when workers are killed three times in a row."""
        for attempt in range(_ATTEMPTS):
            try:
                batch = next(self._iterator)
                break
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
                _logger.warning("a process that prepares data was killed: starting it again")
                self._iterator.close()
                self._iterator = self._start()
                self.seek(self.position)
        self.position = self._iterator.get_state()
        return batch

    def close(self) -> None:
        """Ends what prepares batches."""
        self._iterator.close()


def open_input(
    run: RunConfig, source: Source, workdir: epath.PathLike, mesh: Mesh, cache: TeacherCache | None = None
) -> tuple[ResumableIterator, BadSamples]:
    """The batches of a run from its source as global arrays, and the bad samples, which go to bad_samples.jsonl.

    Every process has a list of its own, that of process p > 0 is bad_samples.p.jsonl. A collective.

    Raises:
      FileNotFoundError, ValueError: the data are not there, do not fit the configuration, or are not the same on every
        process.
    """
    process = jax.process_index()
    with together():
        own = digest(source)
    digests = allgather_json(own)
    if other := next((i for i, each in enumerate(digests) if each != digests[0]), None):
        raise ValueError(
            f"{run.data.source}: process {other} sees other data than process 0 ({digests[other]}, not {digests[0]}); "
            "make its files those of the others, or readable (docs/data.md)"
        )
    name = f"bad_samples.{process}.jsonl" if process else "bad_samples.jsonl"
    bad = BadSamples(epath.Path(workdir) / name, run.data.max_bad_share, len(source))

    def start() -> DevicePrefetch:
        rows = train_data(run, source, process_index=process, process_count=jax.process_count(), cache=cache, bad=bad)
        return DevicePrefetch(rows, mesh)

    return ResumableIterator(start), bad
