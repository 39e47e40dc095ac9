"""Retrieval between images and their captions: recall without the matrix of all scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

_TILE = 2048  # captions and images whose scores are held at a time: 16 MiB

Embeddings = npt.NDArray[np.floating[Any]]


class Ranks(NamedTuple):
    """Where the right answer stands, 0 being first.

    Attributes:
      image: of each caption (M,): how many images go before its own. int64, as the other.
      text: of each image (N,): how many captions of other images go before the best of its own; the largest int64 of an
        image without a caption.
    """

    image: npt.NDArray[np.int64]
    text: npt.NDArray[np.int64]


def retrieval_recall(
    image_embeddings: Embeddings,
    text_embeddings: Embeddings,
    text_to_image: npt.ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@k both ways, shares of 0–1, named as CLIP_benchmark names them.

    `image_retrieval_recall@k` is the share of captions whose image is among the k images most similar to them,
    `text_retrieval_recall@k` the share of images that have any of their captions among the k captions most similar;
    an image without a caption never has. Arguments, ties and errors are those of `retrieval_ranks`.
    """
    return recall(retrieval_ranks(image_embeddings, text_embeddings, text_to_image), ks)


def recall(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """The shares of ranks below each k, by the names of the metrics."""
    return {
        f"{kind}_retrieval_recall@{k}": float(np.mean(getattr(ranks, kind) < k)) for k in ks for kind in Ranks._fields
    }


def retrieval_ranks(image_embeddings: Embeddings, text_embeddings: Embeddings, text_to_image: npt.ArrayLike) -> Ranks:
    """Ranks by inner product in float32; memory beyond the arguments does not grow with N · M.

    Of two equal scores the one earlier in its array goes first. Captions that are the same text do tie; torch.topk,
    and so CLIP_benchmark, leaves open which of them it takes.

    Args:
      image_embeddings: (N, D) of any floating dtype, normalised if cosine similarity is meant; read tile by tile, so
        it may be a memory map. N and M are below 2**31.
      text_embeddings: (M, D), the same.
      text_to_image: the image of each caption, integers (M,) of 0 to N − 1.

    Raises:
      ValueError: no images or no captions, shapes that do not fit, an image that is not there, or embeddings that are
        not finite.
    """
    owners = _checked(image_embeddings, text_embeddings, text_to_image)
    count, captions = len(image_embeddings), len(text_embeddings)
    own = np.empty(captions, np.float32)
    for start in range(0, captions, _TILE):
        part = slice(start, start + _TILE)
        own[part] = np.asarray(_diagonal(_tile(text_embeddings[part]), _tile(image_embeddings[owners[part]])))[
            : len(own[part])
        ]
    if not np.isfinite(own).all():
        raise ValueError(f"the embedding of caption {np.isfinite(own).argmin()} or of its image is not finite")
    best = np.full(count, -np.inf, np.float32)
    np.maximum.at(best, owners, own)
    first = np.full(count, captions, np.int64)
    is_best = np.flatnonzero(own == best[owners])
    np.minimum.at(first, owners[is_best], is_best)

    ranks = Ranks(np.zeros(captions, np.int64), np.zeros(count, np.int64))
    for left in range(0, count, _TILE):
        columns = slice(left, left + _TILE)
        images = _tile(image_embeddings[columns])
        if not np.isfinite(images).all():
            raise ValueError(f"image embeddings {left} to {min(left + _TILE, count) - 1} are not all finite")
        for top in range(0, captions, _TILE):
            rows = slice(top, top + _TILE)
            scores = _scores(_tile(text_embeddings[rows]), images)
            before_image, before_text = _ahead(
                scores,
                _padded(own[rows], np.inf),
                _padded(owners[rows].astype(np.int32), -1),
                _padded(best[columns], np.inf),
                _padded(first[columns].astype(np.int32), -1),
                np.array([top, left, captions, count], np.int32),
            )
            ranks.image[rows] += np.asarray(before_image)[: len(own[rows])]
            ranks.text[columns] += np.asarray(before_text)[: len(best[columns])]
    ranks.text[best == -np.inf] = np.iinfo(np.int64).max
    return ranks


@jax.jit
def _scores(texts: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.matmul(texts, images.T, precision="highest")


def _diagonal(texts: npt.NDArray[np.float32], images: npt.NDArray[np.float32]) -> jax.Array:
    # By the same matrix product as all other scores: only so do equal captions have equal scores, to the bit.
    return jnp.diagonal(_scores(texts, images))


@jax.jit
def _ahead(
    scores: jax.Array, own: jax.Array, owners: jax.Array, best: jax.Array, first: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many images of a tile go before each caption's own, and how many captions before each image's best."""
    top, left, captions, count = place
    caption, image = (start + jnp.arange(_TILE, dtype=jnp.int32) for start in (top, left))
    other = (owners[:, None] != image) & (image < count) & (caption < captions)[:, None]
    before_image = (scores > own[:, None]) | ((scores == own[:, None]) & (image < owners[:, None]))
    before_text = (scores > best) | ((scores == best) & (caption[:, None] < first))
    return (other & before_image).sum(1), (other & before_text).sum(0)


def _tile(rows: Embeddings) -> npt.NDArray[np.float32]:
    return _padded(np.asarray(rows, np.float32), 0)


def _padded(rows: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
    return np.pad(rows, [(0, _TILE - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=fill)


def _checked(images: Embeddings, texts: Embeddings, text_to_image: npt.ArrayLike) -> npt.NDArray[np.int64]:
    owners = np.asarray(text_to_image)
    if not len(images) or not len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} captions: retrieval needs some of both")
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"embeddings are {images.shape} and {texts.shape}: they must be (N, D) and (M, D)")
    if owners.shape != (len(texts),) or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(f"text_to_image is {owners.dtype} {owners.shape}: it must be integers ({len(texts)},)")
    if not 0 <= owners.min() <= owners.max() < len(images):
        raise ValueError(f"text_to_image is {owners.min()} to {owners.max()}: the images are 0 to {len(images) - 1}")
    return owners.astype(np.int64)
