"""What a model got wrong: which images, and which classes it takes for which."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.data.eval_batches import to_pil
from tclip_jax.data.sources import BadSample, Record, Source
from tclip_jax.evaluation.metrics import average_precision
from tclip_jax.evaluation.results import Predictions

_SIDE = 136  # pixels of a thumbnail, as wide as a page shows it
_LETTERS = 120


class Example(NamedTuple):
    """An image and what to say of it.

    Attributes:
      thumbnail: a JPEG.
      small: whether it is smaller than it will be shown.
      truth: its class or classes, or one of its captions.
      predicted: what the model made of it.
    """

    thumbnail: bytes
    small: bool
    truth: str
    predicted: str


def examples(predictions: Predictions, source: Source, limit: int) -> list[Example]:
    """Up to `limit` mistakes, spread evenly over the data set; of retrieval the images whose captions rank worst.

    A mistake is a most probable class that is not among the labels. Images that cannot be read are passed over.

    Args:
      predictions: as `read_predictions` describes them.
      source: the data that was evaluated.

    Raises:
      ValueError: the source has another image in the place of one of them, or fewer classes.
    """
    _check_classes(predictions, source.classnames)
    found = []
    for row in map(int, _wrong(predictions, limit)):
        if record := _record(predictions, row, source):
            found.append(_example(record, *_words(predictions, row, record, source.classnames)))
    return [each for each in found if each]


def changed(first: Predictions, second: Predictions, keys: Sequence[str], source: Source, limit: int) -> list[Example]:
    """Up to `limit` of the images with these keys, spread evenly, and what either model made of them.

    Raises:
      ValueError: the source has another image in the place of one of them, or fewer classes.
    """
    for predictions in (first, second):
        _check_classes(predictions, source.classnames)
    found = []
    for key in (keys[i] for i in _spread(len(keys), limit)):
        here, there = (int(np.flatnonzero(each["keys"] == key)[0]) for each in (first, second))
        if record := _record(first, here, source):
            truth, a = _words(first, here, record, source.classnames)
            _, b = _words(second, there, record, source.classnames)
            found.append(_example(record, truth, f"A: {a}; B: {b}"))
    return [each for each in found if each]


def _check_classes(predictions: Predictions, classnames: Sequence[str]) -> None:
    if "scores" in predictions:
        classes = predictions["scores"].shape[1]
    else:
        named = [predictions[each] for each in ("labels", "top") if each in predictions]
        classes = 1 + max((int(each.max()) for each in named if each.size), default=-1)
    if classes > len(classnames):
        raise ValueError(f"the predictions are of {classes} classes, and the data now has {len(classnames)}")


def _record(predictions: Predictions, row: int, source: Source) -> Record | None:
    """The record that a row is of; None where it cannot be read."""
    place, key = int(predictions["index"][row]), str(predictions["keys"][row])
    try:
        record = source[place] if place < len(source) else None
    except BadSample:
        return None
    if record is None or record.name != key:
        raise ValueError(f"image {place} is {record.name if record else 'not there'}, not {key}")
    return record


def _example(record: Record, truth: str, predicted: str) -> Example | None:
    try:
        picture = to_pil(record.image).convert("RGB")
    except ValueError:
        return None
    small = max(picture.size) < _SIDE // 2
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return Example(buffer.getvalue(), small, truth[:_LETTERS], predicted[:_LETTERS])


def confusions(predictions: Predictions, classnames: Sequence[str], limit: int) -> list[tuple[str, str, int]]:
    """The commonest mistakes of classification: true class, predicted class, how many images."""
    labels, predicted = predictions["labels"].astype(np.int64), predictions["top"][:, 0].astype(np.int64)
    pairs, counts = np.unique(np.stack([labels, predicted])[:, labels != predicted], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(classnames[pairs[0, i]], classnames[pairs[1, i]], int(counts[i])) for i in order]


def weakest_classes(predictions: Predictions, classnames: Sequence[str], limit: int) -> list[tuple[str, float, int]]:
    """The classes with the least recall, or of several labels average precision: name, fraction 0–1, images of it."""
    labels = predictions["labels"]
    if "scores" in predictions:
        images, values = labels.sum(axis=0).astype(np.int64), average_precision(predictions["scores"], labels)
    else:
        images = np.bincount(labels, minlength=len(classnames))
        right = np.bincount(labels[labels == predictions["top"][:, 0]], minlength=len(classnames))
        values = right / np.maximum(images, 1)
    (present,) = np.nonzero(images)
    order = present[np.argsort(values[present], kind="stable")][:limit]
    return [(classnames[i], float(values[i]), int(images[i])) for i in order]


def _wrong(predictions: Predictions, limit: int) -> npt.NDArray[np.intp]:
    if "text_rank" in predictions:
        worst = np.argsort(-predictions["text_rank"], kind="stable")[:limit]
        return worst[predictions["text_rank"][worst] > 0]
    if "scores" in predictions:
        top = predictions["scores"].argmax(axis=1)
        (wrong,) = np.nonzero(predictions["labels"][np.arange(len(top)), top] == 0)
    else:
        (wrong,) = np.nonzero(predictions["top"][:, 0] != predictions["labels"])
    return wrong[_spread(len(wrong), limit)]


def _spread(count: int, limit: int) -> npt.NDArray[np.intp]:
    """Up to `limit` of 0 to count − 1, evenly."""
    return np.unique(np.linspace(0, count - 1, limit).astype(np.intp)) if count else np.empty(0, np.intp)


def _words(predictions: Predictions, row: int, record: Record, classnames: Sequence[str]) -> tuple[str, str]:
    """The truth, and what the model predicted."""
    if "text_rank" in predictions:
        texts = len(predictions["image_rank"])
        return record.captions[0], f"best caption is number {predictions['text_rank'][row] + 1:,} of {texts:,}"
    if "scores" in predictions:
        truth = ", ".join(classnames[int(c)] for c in np.flatnonzero(predictions["labels"][row]))
        return truth or "none", classnames[int(predictions["scores"][row].argmax())]
    return classnames[int(predictions["labels"][row])], classnames[int(predictions["top"][row, 0])]
