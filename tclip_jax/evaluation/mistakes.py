"""The mistakes of a model: misclassified images, confused classes, and the classes with the lowest metric."""

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

_SIDE = 272  # pixels of a thumbnail: twice its width on the page, for fine screens
_SMALL = 64  # smaller images are shown with visible pixels
_MAX_CHARACTERS = 120


class Example(NamedTuple):
    """An image with its truth and its prediction.

    Attributes:
      thumbnail: JPEG file.
      small: whether the image is so small that the page shows its pixels.
      truth: the class or classes of the image, or one of its captions.
      predicted: the prediction in words, or those of both models.
      name: name of the sample.
    """

    thumbnail: bytes
    small: bool
    truth: str
    predicted: tuple[str, ...]
    name: str


def examples(predictions: Predictions, source: Source, limit: int) -> list[Example]:
    """Return up to `limit` mistakes, spread evenly over the data set. Unreadable images are skipped.

    A mistake is an image whose most probable class is not among its labels. In retrieval, the mistakes are the images
    whose captions rank worst.

    Args:
      predictions: output of `read_predictions`.
      source: the evaluated data.
      limit: number of mistakes.

    Raises:
      ValueError: the source has fewer classes than the predictions, or another image at an index.
    """
    _check_classes(predictions, source.classnames)
    shown = []
    for row in map(int, _mistakes(predictions, limit)):
        if record := _record(predictions, row, source):
            shown.append(_example(record, *_describe(predictions, row, record, source.classnames)))
    return [each for each in shown if each]


def changed(first: Predictions, second: Predictions, keys: Sequence[str], source: Source, limit: int) -> list[Example]:
    """Return up to `limit` of the images with the given keys, spread evenly, with the predictions of both models.

    Raises:
      ValueError: the source has fewer classes than the predictions, or another image at an index.
    """
    for predictions in (first, second):
        _check_classes(predictions, source.classnames)
    shown = []
    for key in (keys[i] for i in _spread(len(keys), limit)):
        row_a, row_b = (int(np.flatnonzero(each["keys"] == key)[0]) for each in (first, second))
        if record := _record(first, row_a, source):
            truth, a = _describe(first, row_a, record, source.classnames)
            _, b = _describe(second, row_b, record, source.classnames)
            shown.append(_example(record, truth, a, b))
    return [each for each in shown if each]


def _check_classes(predictions: Predictions, classnames: Sequence[str]) -> None:
    if "scores" in predictions:
        classes = predictions["scores"].shape[1]
    else:
        indices = [predictions[each] for each in ("labels", "top") if each in predictions]
        classes = 1 + max((int(each.max()) for each in indices if each.size), default=-1)
    if classes > len(classnames):
        raise ValueError(f"the predictions have {classes} classes, but the data has {len(classnames)}")


def _record(predictions: Predictions, row: int, source: Source) -> Record | None:
    """Return the record of a row; None if it cannot be read."""
    index, key = int(predictions["index"][row]), str(predictions["keys"][row])
    try:
        record = source[index] if index < len(source) else None
    except BadSample:
        return None
    if record is None or record.name != key:
        raise ValueError(f"image {index} is {record.name if record else 'missing'}, not {key}")
    return record


def _example(record: Record, truth: str, *predicted: str) -> Example | None:
    try:
        picture = to_pil(record.image).convert("RGB")
    except ValueError:
        return None
    small = max(picture.size) < _SMALL
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    truth, *rest = map(_shortened, (truth, *predicted))
    return Example(buffer.getvalue(), small, truth, tuple(rest), record.name)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def confusions(predictions: Predictions, classnames: Sequence[str], limit: int) -> list[tuple[str, str, int]]:
    """Return the most frequent confusions of single-label predictions: (true class, predicted class, images)."""
    labels, predicted = predictions["labels"].astype(np.int64), predictions["top"][:, 0].astype(np.int64)
    pairs, counts = np.unique(np.stack([labels, predicted])[:, labels != predicted], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(classnames[pairs[0, i]], classnames[pairs[1, i]], int(counts[i])) for i in order]


def weakest_classes(predictions: Predictions, classnames: Sequence[str], limit: int) -> list[tuple[str, float, int]]:
    """Return the classes with the lowest recall, or average precision if multi-label: (name, value, images)."""
    labels = predictions["labels"]
    if "scores" in predictions:
        images, values = labels.sum(axis=0).astype(np.int64), average_precision(predictions["scores"], labels)
    else:
        images = np.bincount(labels, minlength=len(classnames))
        correct = np.bincount(labels[labels == predictions["top"][:, 0]], minlength=len(classnames))
        values = correct / np.maximum(images, 1)
    (present,) = np.nonzero(images)
    order = present[np.argsort(values[present], kind="stable")][:limit]
    return [(classnames[i], float(values[i]), int(images[i])) for i in order]


def _mistakes(predictions: Predictions, limit: int) -> npt.NDArray[np.intp]:
    if "text_rank" in predictions:
        worst = np.argsort(-predictions["text_rank"], kind="stable")[:limit]
        return worst[predictions["text_rank"][worst] > 0]
    if "scores" in predictions:
        top = predictions["scores"].argmax(axis=1)
        (mistakes,) = np.nonzero(predictions["labels"][np.arange(len(top)), top] == 0)
    else:
        (mistakes,) = np.nonzero(predictions["top"][:, 0] != predictions["labels"])
    return mistakes[_spread(len(mistakes), limit)]


def _spread(count: int, limit: int) -> npt.NDArray[np.intp]:
    """Return up to `limit` indices below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, limit).astype(np.intp)) if count else np.empty(0, np.intp)


def _describe(predictions: Predictions, row: int, record: Record, classnames: Sequence[str]) -> tuple[str, str]:
    """Return the truth and the prediction in words."""
    if "text_rank" in predictions:
        texts = len(predictions["image_rank"])
        return record.captions[0], f"best caption is number {predictions['text_rank'][row] + 1:,} of {texts:,}"
    if "scores" in predictions:
        truth = ", ".join(classnames[int(c)] for c in np.flatnonzero(predictions["labels"][row]))
        return truth or "none", classnames[int(predictions["scores"][row].argmax())]
    return classnames[int(predictions["labels"][row])], classnames[int(predictions["top"][row, 0])]
