"""The batches of a run."""

from __future__ import annotations

from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.iterator import TrainIterator
from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import Source, open_source
from tclip_jax.data.teacher_cache import TeacherCache
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.training.config import RunConfig


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
