"""Batches for evaluation: every record once, in order, preprocessed without augmentation."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from tclip_jax.data import images
from tclip_jax.data.bad_samples import BadSamples
from tclip_jax.data.images import Preprocess
from tclip_jax.data.pipeline import bad_image, read
from tclip_jax.data.sources import BadSample, Record, Source

_bad = BadSamples()  # of this process: a sample is reported once, however often a run evaluates
_logger = logging.getLogger(__name__)


def eval_batches(
    source: Source,
    *,
    preprocess: Preprocess,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[dict[str, Any]]:
    """Yield this process's rows of every batch. Batches have one shape and hold each record once, in order.

    A batch is a dict with B = batch_size / process_count rows: `image` (B, H, W, 3) uint8, `label` (B,) or (B, C) int32
    (-1 for none), `weight` (B,) float32, `index` (B,) int32, the position in the source, and two lists, `captions`
    (a tuple of strings for each row) and `name`. Unreadable samples are masked: zeros with weight 0. The rows that pad
    the last batch are masked too, with index -1.

    Raises:
      ValueError: `batch_size` is not divisible by `process_count`.
    """
    if batch_size % process_count:
        raise ValueError(f"global batch {batch_size} is not divisible by {process_count} processes")
    share = batch_size // process_count

    def load(number: int) -> dict[str, Any]:
        start = number * batch_size + process_index * share
        rows = [_eval_row(source, i, preprocess) for i in range(start, min(start + share, len(source)))]
        return _pad_and_stack(rows, preprocess, share)

    batches = grain.MapDataset.range(-(-len(source) // batch_size)).map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(threads, max(threads, prefetch))))


def log_bad_samples() -> None:
    """Log the number of bad samples that no earlier call has logged."""
    if news := _bad.news():
        _logger.warning("%s", news)


def _eval_row(source: Source, index: int, preprocess: Preprocess) -> dict[str, Any]:
    image, weight, record = np.zeros((*preprocess.size, 3), np.uint8), 0, Record(b"", (), -1, "")
    try:
        record = read(source, index)
        image, weight = images.preprocess(to_pil(record.image), preprocess), 1
    except ValueError as error:
        bad = error if isinstance(error, BadSample) else bad_image(record, error)
        _bad.add(bad.kind, bad.name, bad.reason)
        record = dataclasses.replace(record, name=bad.name)
    return {
        "image": image,
        "label": record.label,
        "weight": weight,
        "index": index,
        "captions": record.captions,
        "name": record.name,
    }


def _pad_and_stack(rows: list[dict[str, Any]], preprocess: Preprocess, batch_size: int) -> dict[str, Any]:
    # The label of an unreadable record is -1 even where labels are vectors.
    shape = max((np.shape(row["label"]) for row in rows), default=())
    none, image = np.full(shape, -1), np.zeros((*preprocess.size, 3), np.uint8)
    fill = {"image": image, "label": -1, "weight": 0, "index": -1, "captions": (), "name": ""}
    rows = rows + [fill] * (batch_size - len(rows))
    return {
        "image": np.stack([row["image"] for row in rows]),
        "label": np.array([each if np.shape(each := row["label"]) == shape else none for row in rows], np.int32),
        "weight": np.array([row["weight"] for row in rows], np.float32),
        "index": np.array([row["index"] for row in rows], np.int32),
        "captions": [row["captions"] for row in rows],
        "name": [row["name"] for row in rows],
    }


def to_pil(image: bytes | np.ndarray) -> Image.Image:
    """Return a record's image, decoded; raise ValueError where that fails."""
    return images.decode(image) if isinstance(image, bytes) else Image.fromarray(image)
