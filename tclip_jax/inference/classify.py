"""Zero-shot labels for image files."""

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
    """The label probabilities of an image file.

    Attributes:
      name: path of the image.
      labels: probability by label, the most probable first. They sum to 1, unless the model has a bias of the logits.
    """

    name: str
    labels: dict[str, float]


def classify_images(
    model: Model,
    paths: Sequence[str],
    labels: Sequence[str],
    templates: str | Sequence[str] = DEFAULT,
    batch_size: int = 64,
) -> list[Guess | Failure]:
    """Classify image files by the softmax of logit_scale · cosine over the labels.

    The embedding of a label is the mean of its caption embeddings (CLIP, arXiv 2103.00020, section 3.1.4). With a bias
    of the logits each label has a probability of its own, σ(logit_scale · cosine + bias), whatever the other labels are
    (SigLIP, arXiv 2303.15343, equation 1).

    Args:
      model: the model.
      paths: image files.
      labels: unique and non-empty labels.
      templates: argument of `get_templates`.
      batch_size: images and captions per batch.

    Returns:
      A `Guess` per path in the same order, or a `Failure` if the image is unusable.

    Raises:
      ValueError: labels or templates are invalid.
    """
    if not labels or len(set(labels)) < len(labels) or not all(labels):
        raise ValueError(f"labels are {', '.join(map(repr, labels)) or 'none'}: they must be unique and not empty")
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
            bias = model.logit_bias
            shares = _softmax(logits) if bias is None else np.exp(-np.logaddexp(0, -(logits + bias)))
            guesses = {path: _guess(path, labels, row) for path, row in zip(readable, shares, strict=True)}
        outcomes += [guesses.get(path) or failed[path] for path in batch]
    return outcomes


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def _guess(path: str, labels: Sequence[str], shares: np.ndarray) -> Guess:
    return Guess(path, {labels[i]: float(shares[i]) for i in np.argsort(-shares, kind="stable")})


def guess_table(guesses: Sequence[Guess], shown: int = 3) -> str:
    """Return an aligned line per image with its most probable labels."""
    cells = []
    for guess in guesses:
        best = list(guess.labels.items())[:shown]
        cells.append([printable(guess.name), *(cell for label, share in best for cell in (label, f"{share:.1%}"))])
    return "\n".join(aligned(cells))
