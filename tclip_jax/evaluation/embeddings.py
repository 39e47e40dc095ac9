"""Embeddings of a source with its labels, kept on disk so that they are computed once."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.data.sources import Source
from tclip_jax.data.sources import digest as data_digest
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.results import read_arrays
from tclip_jax.evaluation.rows import encode_rows
from tclip_jax.evaluation.runner import EVALUATION
from tclip_jax.keys import digest, recipe
from tclip_jax.storage import write_atomic


class LabelledEmbeddings(NamedTuple):
    """The images of a source that can be read and have a class.

    Attributes:
      embeddings: (N, D) float32, normalised.
      labels: (N,) int32.
      keys: names of the images (N,).
      places: of the images in the source (N,) int32.
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
    progress: Callable[[int], Any] = lambda images: None,
) -> LabelledEmbeddings:
    """Embeds every image, or reads what an earlier call left in `cache`.

    A file there is named by the digest of what made it: the model, the content of the data and its class names.

    Args:
      weights: what tells the weights from others', as `fingerprint` of a model.
      cache: folder of the files; None to keep none.

    Raises:
      ValueError: a source without classes or of several labels, in which no image counts, or a broken file.
    """
    if not source.classnames:
        raise ValueError("a probe needs labelled images: these have captions")
    path = None
    if cache is not None:
        made_by = recipe(
            evaluation=EVALUATION,
            model={"weights": weights, **encoder.made_by},
            data={"content": data_digest(source), "classes": source.classnames},
        )
        path = epath.Path(cache) / f"{digest(made_by)}.npz"
        if path.exists():
            found = _read(path)
            progress(len(source))
            return found
    rows, embeddings = encode_rows(encoder, source, progress=progress)
    count = len(source.classnames)
    good = [
        i
        for i, (label, readable) in enumerate(zip(rows.labels, rows.readable, strict=True))
        if readable and isinstance(label, int) and 0 <= label < count
    ]
    if not good:
        raise ValueError("no image can be read and has one class")
    labels = np.array([rows.labels[i] for i in good], np.int32)
    found = LabelledEmbeddings(
        embeddings[good], labels, np.array([rows.names[i] for i in good]), np.array(good, np.int32)
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **found._asdict())
        write_atomic(path, buffer.getvalue())
    return found


def _read(path: epath.Path) -> LabelledEmbeddings:
    try:
        arrays = read_arrays(io.BytesIO(path.read_bytes()))
        found = LabelledEmbeddings(*(arrays[name] for name in LabelledEmbeddings._fields))
        if found.embeddings.ndim != 2 or len({array.shape[:1] for array in found}) > 1:
            raise ValueError("arrays of other shapes")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: not embeddings: {error}; delete it") from None
    return found
