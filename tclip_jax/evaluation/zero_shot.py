"""Zero-shot classification: images against the mean embedding of each class's captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tclip_jax.artifacts.model import Model
from tclip_jax.data.images import normalize
from tclip_jax.data.pipeline import eval_batches
from tclip_jax.data.prompts import captions, get_templates
from tclip_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Classification:
    """The outcome for every readable image of a source, in its order.

    Attributes:
      labels: true classes (N,) int32.
      logits: 100 · cosine similarity to each class (N, C) float32.
      unreadable: images that could not be decoded, and are in neither.
    """

    labels: npt.NDArray[np.int32]
    logits: npt.NDArray[np.float32]
    unreadable: int

    @property
    def predictions(self) -> npt.NDArray[np.intp]:
        """The most similar class of each image (N,)."""
        return self.logits.argmax(axis=-1)

    @property
    def accuracy(self) -> float:
        """Share of images whose most similar class is their own, 0–1; NaN without images."""
        return float(np.mean(self.predictions == self.labels)) if len(self.labels) else float("nan")


def class_embeddings(
    model: Model, classnames: Sequence[str], templates: str | Sequence[str]
) -> npt.NDArray[np.float32]:
    """One L2-normalised row per class (C, embed_dim): the mean over templates of the normalised caption embeddings.

    Source: CLIP, arXiv 2103.00020, section 3.1.4 (prompt ensembles in embedding space).
    """
    templates = get_templates(templates)
    texts = [caption for name in classnames for caption in captions(name, templates)]
    means = model.encode_text(texts).reshape(len(classnames), len(templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=-1, keepdims=True)


def classify(model: Model, source: Source, templates: str | Sequence[str], batch_size: int = 128) -> Classification:
    """Classifies every image of a labelled source.

    Raises:
      ValueError: the source has captions instead of classes.
    """
    if not source.classnames:
        raise ValueError("zero-shot classification needs a labelled source: this one has captions")
    classes = class_embeddings(model, source.classnames, templates)
    labels, logits, rows = [], [], 0
    for batch in eval_batches(source, preprocess=model.preprocess, batch_size=batch_size):
        pixels = normalize(batch["image"], model.preprocess.mean, model.preprocess.std)
        real = batch["weight"] > 0
        labels.append(batch["label"][real])
        logits.append(100 * model.encode_image(pixels, batch_size=batch_size)[real] @ classes.T)
        rows += int(real.sum())
    return Classification(np.concatenate(labels), np.concatenate(logits), len(source) - rows)
