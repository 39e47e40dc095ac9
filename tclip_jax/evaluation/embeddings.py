"""Embeddings of a labelled source, cached on disk."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.data.sources import Source
from tclip_jax.data.sources import digest as data_digest
from tclip_jax.evaluation.encoder import Encoder, Progress, encode_source
from tclip_jax.evaluation.results import read_arrays
from tclip_jax.evaluation.runner import EVALUATION
from tclip_jax.keys import digest, recipe
from tclip_jax.storage import write_atomic


class LabelledEmbeddings(NamedTuple):
    """The N images of a source that are readable and have a class.

    Attributes:
      embeddings: L2-normalised (N, D) float32.
      labels: class indices (N,) int32.
      keys: image names (N,).
      places: indices of the images in the source (N,) int32.
    """

    embeddings: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    keys: npt.NDArray[np.str_]
    places: npt.NDArray[np.int32]


def labelled_embeddings(
    encoder: Encoder,
    source: Source,
    *,
    weights: str,
    cache: epath.PathLike | None,
    progress: Progress = lambda images: None,
) -> LabelledEmbeddings:
    """Encode every image of a source, or read its embeddings from the cache.

    The name of a cache file is a digest of the model, the content of the data and the class names.

    Args:
      encoder: the model.
      source: images with one class each.
      weights: identity of the weights, such as `fingerprint` of the model.
      cache: folder of the cache; None to disable it.
      progress: called with the number of images processed since the last call.

    Raises:
      ValueError: the source has no classes, no usable image, or several labels per image; or a cache file is damaged.
    """
    if not source.classnames:
        raise ValueError("a probe needs class labels, but the source has captions")
    path = None
    if cache is not None:
        made_by = recipe(
            evaluation=EVALUATION,
            model={"weights": weights, **encoder.made_by},
            data={"content": data_digest(source), "classes": source.classnames},
        )
        path = epath.Path(cache) / f"{digest(made_by)}.npz"
        if path.exists():
            cached = _read(path)
            progress(len(source))
            return cached
    records, embeddings = encode_source(encoder, source, progress=progress)
    classes = len(source.classnames)
    usable = [
        i
        for i, (label, readable) in enumerate(zip(records.labels, records.readable, strict=True))
        if readable and isinstance(label, int) and 0 <= label < classes
    ]
    if not usable:
        raise ValueError("no image is readable and has exactly one class")
    labelled = LabelledEmbeddings(
        embeddings[usable],
        np.array([records.labels[i] for i in usable], np.int32),
        np.array([records.names[i] for i in usable]),
        np.array(usable, np.int32),
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **labelled._asdict())
        write_atomic(path, buffer.getvalue())
    return labelled


def _read(path: epath.Path) -> LabelledEmbeddings:
    try:
        arrays = read_arrays(io.BytesIO(path.read_bytes()))
        cached = LabelledEmbeddings(*(arrays[name] for name in LabelledEmbeddings._fields))
        if cached.embeddings.ndim != 2 or len({array.shape[:1] for array in cached}) > 1:
            raise ValueError("the shapes of the arrays do not match")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: not embeddings: {error}; delete it") from None
    return cached
