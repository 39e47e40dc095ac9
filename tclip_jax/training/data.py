"""The batches of a run."""

from __future__ import annotations

from typing import Any

from tclip_jax.data.pipeline import train_iterator
from tclip_jax.data.sources import open_source
from tclip_jax.data.teacher_cache import TeacherCache
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.training.config import RunConfig


def train_data(
    run: RunConfig, *, process_index: int = 0, process_count: int = 1, cache: TeacherCache | None = None
) -> Any:
    """The Grain iterator of a run's batches: this process's share of each, see `train_iterator`.

    Raises:
      FileNotFoundError, ValueError: there is no such data, or it does not fit the configuration.
    """
    return train_iterator(
        open_source(run.data.source, run.data.split),
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
    )
