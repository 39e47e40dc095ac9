"""Image-caption retrieval: ranks and recall without the full score matrix in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.evaluation.metrics import Floats

_TILE = 2048  # captions and images per tile of scores: 16 MiB in float32


class Ranks(NamedTuple):
    """The rank of the correct answer of each query; 0 is first.

    Attributes:
      image: number of images that rank before the image of each caption (M,) int64.
      text: number of captions of other images that rank before the best caption of each image (N,) int64; the largest
        int64 for an image without captions.
    """

    image: npt.NDArray[np.int64]
    text: npt.NDArray[np.int64]


def retrieval_recall(
    image_embeddings: Floats,
    text_embeddings: Floats,
    text_to_image: npt.ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return recall@k in both directions as fractions, with the names of CLIP_benchmark.

    `image_retrieval_recall@k` is the fraction of captions whose image is among the k most similar images.
    `text_retrieval_recall@k` is the fraction of images with at least one of their captions among the k most similar
    captions; an image without captions is never a hit. For arguments, ties and errors see `retrieval_ranks`.
    """
    return recall(retrieval_ranks(image_embeddings, text_embeddings, text_to_image), ks)


def recall(ranks: Ranks, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return the fraction of ranks below each k, by metric name."""
    return {
        f"{kind}_retrieval_recall@{k}": float(np.mean(getattr(ranks, kind) < k)) for k in ks for kind in Ranks._fields
    }


def retrieval_ranks(image_embeddings: Floats, text_embeddings: Floats, text_to_image: npt.ArrayLike) -> Ranks:
    """Rank images and captions by inner product in float32. Memory use does not grow with N · M.

    Of two equal scores, the one with the lower index ranks first. Identical captions have identical scores;
    `torch.topk`, and so CLIP_benchmark, does not define their order.

    Args:
      image_embeddings: (N, D) of any floating dtype, L2-normalised for cosine similarity. It is read tile by tile, so
        a memory map is fine. N and M must be below 2**31.
      text_embeddings: (M, D), likewise.
      text_to_image: index of the image of each caption, integers (M,) in [0, N).

    Raises:
      ValueError: there are no images or no captions, shapes do not match, an index is out of range, or embeddings are
        not finite.
    """
    owners = _checked(image_embeddings, text_embeddings, text_to_image)
    count, captions = len(image_embeddings), len(text_embeddings)
    own_score = np.empty(captions, np.float32)
    for start in range(0, captions, _TILE):
        part = slice(start, start + _TILE)
        diagonal = _diagonal(_tile(text_embeddings[part]), _tile(image_embeddings[owners[part]]))
        own_score[part] = np.asarray(diagonal)[: len(own_score[part])]
    if not np.isfinite(own_score).all():
        index = np.isfinite(own_score).argmin()
        raise ValueError(f"the embedding of caption {index} or of its image is not finite")
    best_score = np.full(count, -np.inf, np.float32)
    np.maximum.at(best_score, owners, own_score)
    best_caption = np.full(count, captions, np.int64)
    is_best = np.flatnonzero(own_score == best_score[owners])
    np.minimum.at(best_caption, owners[is_best], is_best)

    ranks = Ranks(np.zeros(captions, np.int64), np.zeros(count, np.int64))
    for left in range(0, count, _TILE):
        columns = slice(left, left + _TILE)
        images = _tile(image_embeddings[columns])
        if not np.isfinite(images).all():
            raise ValueError(f"image embeddings {left} to {min(left + _TILE, count) - 1} are not all finite")
        for top in range(0, captions, _TILE):
            rows = slice(top, top + _TILE)
            before_image, before_text = _ahead(
                _scores(_tile(text_embeddings[rows]), images),
                _padded(own_score[rows], np.inf),
                _padded(owners[rows].astype(np.int32), -1),
                _padded(best_score[columns], np.inf),
                _padded(best_caption[columns].astype(np.int32), -1),
                np.array([top, left, captions, count], np.int32),
            )
            ranks.image[rows] += np.asarray(before_image)[: len(own_score[rows])]
            ranks.text[columns] += np.asarray(before_text)[: len(best_score[columns])]
    ranks.text[best_score == -np.inf] = np.iinfo(np.int64).max
    return ranks


@jax.jit
def _scores(texts: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.matmul(texts, images.T, precision="highest")


def _diagonal(texts: npt.NDArray[np.float32], images: npt.NDArray[np.float32]) -> jax.Array:
    # The same matrix product as for all other scores, so that identical captions have bit-identical scores.
    return jnp.diagonal(_scores(texts, images))


@jax.jit
def _ahead(
    scores: jax.Array,
    own_score: jax.Array,
    owners: jax.Array,
    best_score: jax.Array,
    best_caption: jax.Array,
    offsets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Count, within a tile, the images ranked before each caption's image and the captions before each image's best.

    Args:
      offsets: (first caption of the tile, first image of the tile, M, N).
    """
    top, left, captions, count = offsets
    caption, image = (start + jnp.arange(_TILE, dtype=jnp.int32) for start in (top, left))
    competes = (owners[:, None] != image) & (image < count) & (caption < captions)[:, None]
    before_image = (scores > own_score[:, None]) | ((scores == own_score[:, None]) & (image < owners[:, None]))
    before_text = (scores > best_score) | ((scores == best_score) & (caption[:, None] < best_caption))
    return (competes & before_image).sum(1), (competes & before_text).sum(0)


def _tile(rows: Floats) -> npt.NDArray[np.float32]:
    return _padded(np.asarray(rows, np.float32), 0)


def _padded(rows: npt.NDArray[Any], fill: float) -> npt.NDArray[Any]:
    return np.pad(rows, [(0, _TILE - len(rows)), *[(0, 0)] * (rows.ndim - 1)], constant_values=fill)


def _checked(images: Floats, texts: Floats, text_to_image: npt.ArrayLike) -> npt.NDArray[np.int64]:
    owners = np.asarray(text_to_image)
    if not len(images) or not len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} captions: retrieval needs at least one of each")
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"embeddings are {images.shape} and {texts.shape}: they must be (N, D) and (M, D)")
    if owners.shape != (len(texts),) or not np.issubdtype(owners.dtype, np.integer):
        raise ValueError(f"text_to_image is {owners.dtype} {owners.shape}: it must be integers ({len(texts)},)")
    if not 0 <= owners.min() <= owners.max() < len(images):
        raise ValueError(f"text_to_image is {owners.min()} to {owners.max()}: it must be 0 to {len(images) - 1}")
    return owners.astype(np.int64)
