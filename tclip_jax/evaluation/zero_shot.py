"""Zero-shot evaluation: images against the mean embedding of each class's captions, or against captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tclip_jax.data.prompts import captions, get_templates
from tclip_jax.data.sources import Source
from tclip_jax.data.sources.webdataset import Kind
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.metrics import classification_metrics, mean_average_precision, top_k
from tclip_jax.evaluation.results import Predictions
from tclip_jax.evaluation.retrieval import recall, retrieval_ranks
from tclip_jax.evaluation.rows import ImageRecords, Progress, encode_rows
from tclip_jax.inference.model import Embeddings

UNREADABLE = "unreadable image"
NO_LABEL = "label missing or out of range"
NO_CAPTION = "no caption"
_CHUNK = 1 << 14  # captions of classes that are embedded at a time

Templates = str | Sequence[str]


def _nothing(images: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model makes of a source.

    Attributes:
      metrics: fractions 0–1 by CLIP_benchmark's names.
      predictions: arrays with a row per image that counts, as `read_predictions` describes them.
      failed: images that do not count, by reason.
    """

    metrics: dict[str, float]
    predictions: Predictions
    failed: dict[str, int]

    @property
    def samples(self) -> int:
        """Images that count."""
        return len(self.predictions["index"])


def class_embeddings(encoder: Encoder, classnames: Sequence[str], templates: Templates) -> Embeddings:
    """One L2-normalised row per class (C, D): the mean over templates of the normalised caption embeddings.

    Source: CLIP, arXiv 2103.00020, section 3.1.4 (prompt ensembles in embedding space).
    """
    templates = get_templates(templates)
    step = max(_CHUNK // len(templates), 1)
    means = []
    for start in range(0, len(classnames), step):
        names = classnames[start : start + step]
        embeddings = encoder.texts([caption for name in names for caption in captions(name, templates)])
        means.append(embeddings.reshape(len(names), len(templates), -1).mean(axis=1))
    rows = np.concatenate(means)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def classify(encoder: Encoder, source: Source, templates: Templates, progress: Progress = _nothing) -> Outcome:
    """acc1, acc5 (NaN of fewer than five classes) and mean_per_class_recall of a labelled source.

    Raises:
      ValueError: the source has captions instead of classes, no image counts, or embeddings are not finite.
    """
    count = len(_classnames(source))
    classes = class_embeddings(encoder, source.classnames, templates)
    rows, top = encode_rows(encoder, source, lambda images: top_k(100 * images @ classes.T, 5), progress)
    kept, failed = _kept(rows, NO_LABEL, lambda i: isinstance(rows.labels[i], int) and 0 <= rows.labels[i] < count)
    labels, top = np.array([rows.labels[i] for i in kept], np.int32), top[kept]
    metrics = classification_metrics(top, labels, count)
    return Outcome(metrics, _named(rows, kept) | {"labels": labels, "top": top}, failed)


def classify_several(encoder: Encoder, source: Source, templates: Templates, progress: Progress = _nothing) -> Outcome:
    """mean_average_precision of a source whose images are of several classes each; raises what `classify` raises."""
    count = len(_classnames(source))
    classes = class_embeddings(encoder, source.classnames, templates)
    rows, scores = encode_rows(encoder, source, lambda images: 100 * images @ classes.T, progress)
    kept, failed = _kept(rows, NO_LABEL, lambda i: np.shape(rows.labels[i]) == (count,) and min(rows.labels[i]) >= 0)
    labels, scores = np.array([rows.labels[i] for i in kept], np.uint8), scores[kept]
    metrics = {"mean_average_precision": mean_average_precision(scores, labels)}
    return Outcome(metrics, _named(rows, kept) | {"labels": labels, "scores": scores}, failed)


def retrieve(encoder: Encoder, source: Source, templates: Templates = (), progress: Progress = _nothing) -> Outcome:
    """Recall@1, 5 and 10 of images by their captions and of captions by their images; `templates` mean nothing here.

    Raises:
      ValueError: no image counts, or embeddings are not finite.
    """
    rows, images = encode_rows(encoder, source, progress=progress)
    kept, failed = _kept(rows, NO_CAPTION, lambda i: any(caption.strip() for caption in rows.captions[i]))
    text_to_image = np.repeat(np.arange(len(kept)), [len(rows.captions[i]) for i in kept])
    ranks = retrieval_ranks(
        images[kept], encoder.texts([text for i in kept for text in rows.captions[i]]), text_to_image
    )
    found = {"text_rank": ranks.text, "image_rank": ranks.image, "text_to_image": text_to_image}
    return Outcome(recall(ranks), _named(rows, kept) | found, failed)


EVALUATORS: dict[Kind, Callable[[Encoder, Source, Templates, Progress], Outcome]] = {
    "classification": classify,
    "multilabel": classify_several,
    "retrieval": retrieve,
}


def _classnames(source: Source) -> Sequence[str]:
    if not source.classnames:
        raise ValueError("zero-shot classification needs a labelled source: this one has captions")
    return source.classnames


def _kept(rows: ImageRecords, reason: str, is_good: Callable[[int], Any]) -> tuple[list[int], dict[str, int]]:
    """The images that count, and how many do not and why; an image without pixels counts as that alone."""
    readable = [i for i, yes in enumerate(rows.readable) if yes]
    kept = [i for i in readable if is_good(i)]
    counts = {UNREADABLE: len(rows.readable) - len(readable), reason: len(readable) - len(kept)}
    failed = {why: count for why, count in counts.items() if count}
    if not kept:
        raise ValueError(f"no image counts: {', '.join(f'{count:,} x {why}' for why, count in failed.items())}")
    return kept, failed


def _named(rows: ImageRecords, kept: list[int]) -> Predictions:
    return {"keys": np.array([rows.names[i] for i in kept]), "index": np.array(kept, np.int32)}
