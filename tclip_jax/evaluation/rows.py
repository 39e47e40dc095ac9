"""A source through the image tower: each image once, over all processes, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.data.eval_batches import eval_batches
from tclip_jax.data.sources import Source
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.parallel.agreement import allgather_json

Reduce = Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]
Progress = Callable[[int], Any]


class ImageRecords(NamedTuple):
    """What a source says of its images, in its order: lists of N.

    Attributes:
      names: of the records.
      labels: a class, or a 0/1 vector over the classes.
      captions: of each image.
      readable: whether the image could be decoded.
    """

    names: list[str]
    labels: list[Any]
    captions: list[list[str]]
    readable: list[bool]


def encode_rows(
    encoder: Encoder, source: Source, reduce: Reduce = np.asarray, progress: Progress = lambda images: None
) -> tuple[ImageRecords, npt.NDArray[Any]]:
    """What `reduce` makes of the embedding of every image (N, …), and the rest of the records.

    Only that stays in memory, on every process; an image that could not be decoded has the value of a black one.

    Args:
      reduce: embeddings (B, D) float32 to rows (B, …).
      progress: called with the number of images done since.

    Raises:
      ValueError: an empty source, or embeddings that are not finite.
    """
    if not len(source):
        raise ValueError("there are no images")
    values: list[npt.NDArray[Any]] = []
    told: list[list[Any]] = []
    waiting: jax.Array | None = None
    for batch in eval_batches(
        source,
        preprocess=encoder.preprocess,
        batch_size=encoder.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        computing = encoder.images(batch["image"])
        # Reading waits: one batch late, the devices are never kept waiting.
        if waiting is not None:
            values.append(_reduced(waiting, reduce))
            progress(encoder.batch_size)
        waiting = computing
        of_row = zip(
            *(batch[key].tolist() for key in ("index", "label", "weight")),
            batch["name"],
            batch["captions"],
            strict=True,
        )
        told += [[index, name, label, captions, weight > 0] for index, label, weight, name, captions in of_row]
    assert waiting is not None
    values.append(_reduced(waiting, reduce))
    progress(len(source) - encoder.batch_size * (len(values) - 1))
    everyone = sorted(row for rows in allgather_json(told) for row in rows if row[0] >= 0)
    return ImageRecords(*map(list, list(zip(*everyone, strict=True))[1:])), np.concatenate(values)[: len(source)]


def _reduced(embeddings: jax.Array, reduce: Reduce) -> npt.NDArray[Any]:
    found = np.asarray(embeddings)
    if not np.isfinite(found).all():
        raise ValueError("the model's embeddings are not finite")
    return reduce(found)
