"""Fills a store of a teacher's embeddings, and checks that one fits a run."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import tqdm
from etils import epath

from tclip_jax.artifacts.model import Model
from tclip_jax.data.images import normalize
from tclip_jax.data.pipeline import TrainRow
from tclip_jax.data.sources import Source, open_source
from tclip_jax.data.teacher_cache import Embeddings, TeacherCache, copy_generator
from tclip_jax.data.tokenizer import Tokenizer
from tclip_jax.training.config import RunConfig
from tclip_jax.training.objective import check_teacher
from tclip_jax.training.restore import load_model


def write_cache(
    folder: epath.PathLike, run: RunConfig, teacher: str, *, copies: int, batch_size: int = 128, file_rows: int = 4096
) -> TeacherCache:
    """Embeds every sample of `run.data` `copies` times, going on where an earlier call stopped.

    In memory are one batch of images and one file of embeddings.

    Args:
      folder: of the cache, new or begun.
      run: whose data, preprocessing, context length and seed decide what the teacher sees.
      teacher: as of `load_model`.
      copies: augmentations of each sample, at least 1.
      batch_size: images that the teacher sees at once.
      file_rows: embeddings in a file.

    Raises:
      ValueError: a teacher that cannot see the run's images or texts, or a folder that holds another cache.
    """
    if copies < 1:
        raise ValueError(f"copies is {copies}: it must be at least 1")
    model, source = load_model(teacher), open_source(run.data.source, run.data.split)
    check_teacher(model.config, run.model, run.loss)
    cache = TeacherCache(
        str(folder),
        teacher,
        model.config.embed_dim,
        model.logit_scale,
        len(source),
        copies,
        run.seed,
        file_rows,
        describe_inputs(run),
    )
    cache.write_manifest()
    row = train_row(run, source)
    bar = tqdm.tqdm(total=len(source) * copies, unit="sample", desc="teacher", disable=not sys.stderr.isatty())
    with bar:
        for file in range(cache.files):
            if not cache.path(file).exists():
                cache.write(file, _embed(cache, file, model, row, batch_size))
            bar.update(len(cache.rows_of(file)))
    return TeacherCache.open(folder)


def open_cache(run: RunConfig) -> TeacherCache:
    """The cache of a run.

    Raises:
      FileNotFoundError, ValueError: it is not there, broken, not finished, or of other data than the run's.
    """
    cache = TeacherCache.open(run.data.teacher_cache)
    for name, value in describe_inputs(run).items():
        if cache.inputs.get(name) != value:
            raise ValueError(f"{run.data.teacher_cache}: the teacher saw {name} {cache.inputs.get(name)}, not {value}")
    return cache


def describe_inputs(run: RunConfig) -> dict[str, Any]:
    """All that decides, beside the seed, which images and texts a sample can become, as JSON."""
    pixels = dataclasses.asdict(run.preprocess)
    templates = run.data.templates
    return {
        "source": run.data.source,
        "split": run.data.split,
        "templates": templates if isinstance(templates, str) else list(templates),
        "augment": run.data.augment,
        "context_length": run.model.text.context_length,
        "size": list(run.preprocess.size),
        "interpolation": pixels["interpolation"],
        "resize_mode": pixels["resize_mode"],
    }


def train_row(run: RunConfig, source: Source) -> TrainRow:
    """What makes rows of the run's batches."""
    tokenizer = Tokenizer(run.model.text.context_length)
    return TrainRow(source, tokenizer, run.preprocess, run.data.augment, run.data.templates)


def _embed(cache: TeacherCache, file: int, model: Model, row: TrainRow, batch_size: int) -> Embeddings:
    rows, found = cache.rows_of(file), np.zeros((len(cache.rows_of(file)), 2, cache.embed_dim), np.float16)
    for start in range(0, len(rows), batch_size):
        drawn = []
        for number in rows[start : start + batch_size]:
            copy, index = divmod(number, cache.samples)
            drawn.append(row.draw(index, copy_generator(cache.seed, index, copy)))
        images, tokens = (np.stack([each[name] for each in drawn]) for name in ("image", "tokens"))
        pixels = normalize(images, model.preprocess.mean, model.preprocess.std)
        embeddings = (
            model.encode_image(pixels, batch_size=batch_size),
            model.encode_text(tokens, batch_size=batch_size),
        )
        found[start : start + len(drawn)] = np.stack(embeddings, axis=1)
    return found
