"""Zero-shot evaluation: classify images by the mean caption embedding of each class, or retrieve captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tclip_jax.data.prompts import captions, get_templates
from tclip_jax.data.sources import Source
from tclip_jax.data.sources.webdataset import Kind
from tclip_jax.evaluation.encoder import Encoder, ImageRecords, Progress, encode_source
from tclip_jax.evaluation.metrics import classification_metrics, mean_average_precision, top_k
from tclip_jax.evaluation.results import Predictions
from tclip_jax.evaluation.retrieval import recall, retrieval_ranks
from tclip_jax.inference.model import Embeddings

UNREADABLE = "unreadable image"
NO_LABEL = "label missing or out of range"
NO_CAPTION = "no caption"
_CHUNK = 1 << 14  # class captions per call of the text tower

Templates = str | Sequence[str]


def _no_progress(images: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The evaluation of a model on a source.

    Attributes:
      metrics: fractions in [0, 1], with the names of CLIP_benchmark.
      predictions: arrays with one row per counted image; see `read_predictions`.
      failed: number of images that are not counted, by reason.
    """

    metrics: dict[str, float]
    predictions: Predictions
    failed: dict[str, int]

    @property
    def samples(self) -> int:
        """Number of counted images."""
        return len(self.predictions["index"])


def class_embeddings(encoder: Encoder, classnames: Sequence[str], templates: Templates) -> Embeddings:
    """Return the L2-normalised class embeddings (C, D): means over templates of normalised caption embeddings.

    Source: CLIP, arXiv 2103.00020, section 3.1.4 (prompt ensembling in embedding space).
    """
    templates = get_templates(templates)
    step = max(_CHUNK // len(templates), 1)
    means = []
    for start in range(0, len(classnames), step):
        names = classnames[start : start + step]
        embeddings = encoder.texts([caption for name in names for caption in captions(name, templates)])
        means.append(embeddings.reshape(len(names), len(templates), -1).mean(axis=1))
    classes = np.concatenate(means)
    return classes / np.linalg.norm(classes, axis=-1, keepdims=True)


def classify(encoder: Encoder, source: Source, templates: Templates, progress: Progress = _no_progress) -> Outcome:
    """Evaluate single-label classification: acc1, acc5 and mean_per_class_recall.

    acc5 is NaN for fewer than five classes.

    Raises:
      ValueError: the source has captions instead of classes or no usable image, or embeddings are not finite.
    """
    count = len(_classnames(source))
    classes = class_embeddings(encoder, source.classnames, templates)
    records, top = encode_source(encoder, source, lambda images: top_k(100 * images @ classes.T, 5), progress)
    labels = records.labels
    counted, failed = _counted(records, NO_LABEL, lambda i: isinstance(labels[i], int) and 0 <= labels[i] < count)
    truth, top = np.array([labels[i] for i in counted], np.int32), top[counted]
    metrics = classification_metrics(top, truth, count)
    return Outcome(metrics, _names(records, counted) | {"labels": truth, "top": top}, failed)


def classify_several(
    encoder: Encoder, source: Source, templates: Templates, progress: Progress = _no_progress
) -> Outcome:
    """Evaluate multi-label classification: mean_average_precision. The errors are those of `classify`."""
    count = len(_classnames(source))
    classes = class_embeddings(encoder, source.classnames, templates)
    records, scores = encode_source(encoder, source, lambda images: 100 * images @ classes.T, progress)
    labels = records.labels
    counted, failed = _counted(records, NO_LABEL, lambda i: np.shape(labels[i]) == (count,) and min(labels[i]) >= 0)
    truth, scores = np.array([labels[i] for i in counted], np.uint8), scores[counted]
    metrics = {"mean_average_precision": mean_average_precision(scores, truth)}
    return Outcome(metrics, _names(records, counted) | {"labels": truth, "scores": scores}, failed)


def retrieve(encoder: Encoder, source: Source, templates: Templates = (), progress: Progress = _no_progress) -> Outcome:
    """Evaluate retrieval in both directions: recall@1, 5 and 10. `templates` is ignored.

    Raises:
      ValueError: the source has no usable image, or embeddings are not finite.
    """
    records, images = encode_source(encoder, source, progress=progress)
    counted, failed = _counted(records, NO_CAPTION, lambda i: any(caption.strip() for caption in records.captions[i]))
    text_to_image = np.repeat(np.arange(len(counted)), [len(records.captions[i]) for i in counted])
    texts = encoder.texts([text for i in counted for text in records.captions[i]])
    ranks = retrieval_ranks(images[counted], texts, text_to_image)
    predictions = {"text_rank": ranks.text, "image_rank": ranks.image, "text_to_image": text_to_image}
    return Outcome(recall(ranks), _names(records, counted) | predictions, failed)


EVALUATORS: dict[Kind, Callable[[Encoder, Source, Templates, Progress], Outcome]] = {
    "classification": classify,
    "multilabel": classify_several,
    "retrieval": retrieve,
}


def _classnames(source: Source) -> Sequence[str]:
    if not source.classnames:
        raise ValueError("zero-shot classification needs class names, but the source has captions")
    return source.classnames


def _counted(records: ImageRecords, reason: str, is_usable: Callable[[int], Any]) -> tuple[list[int], dict[str, int]]:
    """Return the indices of the counted images, and how many images are not counted, by reason.

    An unreadable image is counted only as unreadable, whatever its label or captions are.
    """
    readable = [i for i, is_readable in enumerate(records.readable) if is_readable]
    counted = [i for i in readable if is_usable(i)]
    counts = {UNREADABLE: len(records.readable) - len(readable), reason: len(readable) - len(counted)}
    failed = {why: count for why, count in counts.items() if count}
    if not counted:
        raise ValueError(f"no usable image: {', '.join(f'{count:,} x {why}' for why, count in failed.items())}")
    return counted, failed


def _names(records: ImageRecords, counted: list[int]) -> Predictions:
    return {"keys": np.array([records.names[i] for i in counted]), "index": np.array(counted, np.int32)}
