"""Search in a folder of pictures: an index of embeddings that is brought up to date, and the nearest to a query."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.inference.embed import Store, chunked, embed_images, embeddings_mark, read_image, write_npy_header
from tclip_jax.inference.inputs import Failure, find_images, image_items
from tclip_jax.inference.model import Embeddings, Model
from tclip_jax.storage import atomic_folder, is_local

_MANIFEST, _EMBEDDINGS = "index.json", "embeddings.npy"
_VERSION = 1
_CHUNK = 65536  # rows that are multiplied together: 128 MiB at 512


@dataclasses.dataclass(frozen=True)
class Index:
    """The embeddings of the pictures below a folder.

    Attributes:
      root: the folder.
      model: where the model was, which made the embeddings.
      fingerprint: of that model and its activations, as of `embeddings_mark`.
      names: the N pictures, as paths below `root`.
      keys: of their content.
      embeddings: float32 (N, embed_dim), mapped from the file.
    """

    root: epath.Path
    model: str
    fingerprint: str
    names: list[str]
    keys: list[str]
    embeddings: Embeddings = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Indexed:
    """What `build_index` did: pictures in the index, how many of those it took over, and what could not be read."""

    count: int
    reused: int
    failures: list[Failure]


def build_index(
    model: Model, folder: epath.PathLike, out: epath.PathLike, *, model_path: str, batch_size: int = 64
) -> Indexed:
    """Writes the index of all images below a folder, or brings it up to date.

    An embedding is kept as long as the model and its activations, and the file as `image_items` tells it, are the same.
    A call that was killed leaves the old index, and what it had done beside it for the next call.

    Args:
      model_path: where the model was loaded from.

    Raises:
      FileExistsError: `out` is something else than an index.
      FileNotFoundError, ValueError: no folder, or no images in it.
    """
    root, out = epath.Path(folder).resolve(), epath.Path(out)
    if out.exists() and not (out / _MANIFEST).exists():
        raise FileExistsError(f"{out} has no {_MANIFEST}, so it is not an index that may be brought up to date")
    mark, width = embeddings_mark(model, model_path), model.config.embed_dim
    items, failures = image_items(mark, find_images(root), root)
    old = read_index(out) if out.exists() else None
    kept = {key: row for row, key in enumerate(old.keys)} if old and old.fingerprint == mark else {}
    store = Store(out.parent / f"{out.name}.partial", width)
    failures += embed_images(model, [item for item in items if item.key not in kept], store, batch_size)
    done = [item for item in items if item.key in kept or item.key in store]
    if not done:
        raise ValueError(
            f"{root}: none of {len(failures)} images can be used; {failures[0].name}: {failures[0].reason}"
        )

    def rows() -> Iterator[Embeddings]:
        for item in done:
            yield old.embeddings[kept[item.key]] if old and item.key in kept else store.row(item.key)

    with atomic_folder(out, overwrite=True) as building:
        with (building / _EMBEDDINGS).open("wb") as file:
            write_npy_header(file, len(done), width)
            for chunk in chunked(rows(), width):
                file.write(chunk.astype("<f4", copy=False).tobytes())
        fields = {
            "format": "tclip-index",
            "format_version": _VERSION,
            "root": os.fspath(root),
            "model": model_path,
            "fingerprint": mark,
            "names": [item.name for item in done],
            "keys": [item.key for item in done],
        }
        # Last: on an object store, an index exists from here on.
        (building / _MANIFEST).write_text(json.dumps(fields))
    store.remove()
    return Indexed(len(done), sum(item.key in kept for item in done), failures)


def read_index(path: epath.PathLike) -> Index:
    """An index; its embeddings are read when they are used.

    Raises:
      FileNotFoundError: `path` is none.
      ValueError: it is broken, or of a newer version.
    """
    path = epath.Path(path)
    if not (path / _MANIFEST).exists():
        raise FileNotFoundError(f"{path}/{_MANIFEST}: no such file; expected what `tclip search index` writes")
    try:
        fields = json.loads((path / _MANIFEST).read_text())
        version = fields["format_version"]
        if fields["format"] != "tclip-index" or version != _VERSION:
            raise ValueError(f"format {fields['format']!r} version {version!r}, and version {_VERSION} is read")
        names, keys = fields["names"], fields["keys"]
        # Pictures of the page are read from these paths: none may lead out of the folder.
        if any(os.path.isabs(name) or ".." in name.split("/") for name in names):
            raise ValueError("names must be paths below its root")
        embeddings = _mapped(path / _EMBEDDINGS)
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or not len(embeddings) == len(names) == len(keys):
            kind = f"{embeddings.dtype} {embeddings.shape}"
            raise ValueError(f"{_EMBEDDINGS} is {kind}, where {len(names)} rows of float32 are expected")
        return Index(epath.Path(fields["root"]), fields["model"], fields["fingerprint"], names, keys, embeddings)
    except (KeyError, TypeError, AttributeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a readable index: {type(error).__name__}: {error}") from None


def _mapped(path: epath.Path) -> npt.NDArray[Any]:
    if is_local(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)


class Result(NamedTuple):
    """A picture below the index's root, and the cosine of its angle to the query."""

    name: str
    score: float


def query_index(model: Model, index: Index, query: str | epath.Path, top: int = 20, *, model_path: str) -> list[Result]:
    """The pictures nearest to a text, or to the picture at a path, the nearest first.

    Args:
      model_path: where the model was loaded from.

    Raises:
      ValueError: the index is another model's, or the picture cannot be used.
    """
    if top < 1:
        raise ValueError(f"top is {top}: it must be 1 or more")
    if embeddings_mark(model, model_path) != index.fingerprint:
        raise ValueError(f"the index was made with another model ({index.model}): index the folder again with this one")
    if isinstance(query, str):
        (embedding,) = model.encode_text([query])
    else:
        try:
            (embedding,) = model.encode_image(read_image(model, query)[None])
        except ValueError as error:
            raise ValueError(f"{query}: {error}") from None
    rows, scores = nearest(index.embeddings, embedding, top)
    return [Result(index.names[row], float(score)) for row, score in zip(rows, scores, strict=True)]


def nearest(embeddings: Embeddings, query: Embeddings, top: int) -> tuple[npt.NDArray[np.int64], Embeddings]:
    """The rows with the largest dot products with the query (D,), and these, in falling order; equal ones by row.

    Some thousand rows are in memory at a time.
    """
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(embeddings), _CHUNK):
        chunk = embeddings[start : start + _CHUNK] @ query
        rows = np.concatenate([rows, np.arange(start, start + len(chunk))])
        scores = np.concatenate([scores, chunk])
        best = np.lexsort((rows, -scores))[:top]
        rows, scores = rows[best], scores[best]
    return rows, scores
