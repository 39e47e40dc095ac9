"""Labels for image files: which of some captions fits each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from tclip_jax.data.prompts import DEFAULT, captions
from tclip_jax.inference.embed import read_image
from tclip_jax.inference.inputs import Failure
from tclip_jax.inference.model import Model
from tclip_jax.pages import aligned, printable


@dataclasses.dataclass(frozen=True)
class Guess:
    """The probability of each label for an image file, in 0–1 and summing to 1; the most probable label first."""

    name: str
    labels: dict[str, float]


def classify_images(
    model: Model,
    paths: Sequence[str],
    labels: Sequence[str],
    templates: str | Sequence[str] = DEFAULT,
    batch_size: int = 64,
) -> list[Guess | Failure]:
    """The softmax over the labels of logit_scale · cosine, for each path in its order, or why there is none.

    A label stands for the mean of its captions' embeddings (CLIP, arXiv 2103.00020, section 3.1.4).

    Raises:
      ValueError: no labels, or one twice; templates that are none.
    """
    if not labels or len(set(labels)) < len(labels) or not all(labels):
        raise ValueError(f"labels are {', '.join(map(repr, labels)) or 'none'}: each must be there once, and not empty")
    texts = [caption for label in labels for caption in captions(label, templates)]
    embeddings = model.encode_text(texts, batch_size=batch_size)
    means = embeddings.reshape(len(labels), -1, model.config.embed_dim).mean(axis=1)
    classes = means / np.linalg.norm(means, axis=-1, keepdims=True)
    outcomes: list[Guess | Failure] = []
    for start in range(0, len(paths), batch_size):
        pixels, readable, failed = [], [], {}
        batch = paths[start : start + batch_size]
        for path in batch:
            try:
                pixels.append(read_image(model, epath.Path(path)))
                readable.append(path)
            except (OSError, ValueError) as error:
                failed[path] = Failure.of(path, error)
        guesses = {}
        if pixels:
            logits = model.logit_scale * model.encode_image(np.stack(pixels), batch_size=batch_size) @ classes.T
            guesses = {path: _guess(path, labels, row) for path, row in zip(readable, logits, strict=True)}
        outcomes += [guesses.get(path) or failed[path] for path in batch]
    return outcomes


def _guess(path: str, labels: Sequence[str], logits: np.ndarray) -> Guess:
    exp = np.exp(logits - logits.max())
    probabilities = exp / exp.sum()
    return Guess(path, {labels[i]: float(probabilities[i]) for i in np.argsort(-probabilities, kind="stable")})


def guess_table(guesses: Sequence[Guess], shown: int = 3) -> str:
    """A line for each image with its most probable labels, aligned."""
    cells = []
    for guess in guesses:
        best = list(guess.labels.items())[:shown]
        cells.append([printable(guess.name), *(cell for label, share in best for cell in (label, f"{share:.1%}"))])
    return "\n".join(aligned(cells))
