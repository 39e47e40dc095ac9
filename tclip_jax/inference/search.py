"""Search in a folder of pictures: build and update an index of embeddings, query it, and write a results page."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from etils import epath
from PIL import Image, ImageOps

from tclip_jax.data.images import decode
from tclip_jax.inference.embed import Store, chunked, embed_images, embeddings_mark, write_npy_header
from tclip_jax.inference.inputs import Failure, find_images, image_items
from tclip_jax.inference.model import Embeddings, Model
from tclip_jax.pages import blank, data_uri, page, paragraph, printable
from tclip_jax.storage import atomic_folder, is_local
from tclip_jax.ternary.tensor import Activations

_MANIFEST, _EMBEDDINGS = "index.json", "embeddings.npy"
_VERSION = 1
_CHUNK = 65536  # rows per matrix product: 128 MiB at a width of 512
_THUMBNAIL = 272  # longer side in pixels: twice its size on the page
_PIXELATED = 64  # smaller images are shown with visible pixels


@dataclasses.dataclass(frozen=True)
class Index:
    """The embeddings of the pictures in a folder and its subfolders.

    Attributes:
      root: the folder.
      model: path of the model that made the embeddings.
      fingerprint: `embeddings_mark` of that model.
      activations: those of that model, which queries need too.
      names: paths of the N pictures, relative to `root`.
      keys: keys of their content; see `image_items`.
      embeddings: float32 (N, embed_dim), a memory map of the file if it is local.
    """

    root: epath.Path
    model: str
    fingerprint: str
    activations: Activations
    names: list[str]
    keys: list[str]
    embeddings: Embeddings = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Indexed:
    """The outcome of `build_index`.

    Attributes:
      count: number of pictures in the index.
      reused: how many of them have an embedding from the previous index.
      failures: the unusable pictures.
    """

    count: int
    reused: int
    failures: list[Failure]


def build_index(
    model: Model, folder: epath.PathLike, out: epath.PathLike, *, model_path: str, batch_size: int = 64
) -> Indexed:
    """Write the index of all images in a folder and its subfolders, or update an existing index.

    An embedding is reused if the model, its activations and the key of the file (see `image_items`) are the same. An
    interrupted call keeps the old index, and leaves its partial work in `<out>.partial` for the next call.

    Args:
      model: the model.
      folder: the folder of pictures.
      out: folder of the index.
      model_path: where the model was loaded from.
      batch_size: images per batch.

    Raises:
      FileExistsError: `out` exists and is not an index.
      FileNotFoundError: `folder` does not exist.
      ValueError: `folder` has no usable image.
    """
    root, out = epath.Path(folder).resolve(), epath.Path(out)
    if out.exists() and not (out / _MANIFEST).exists():
        raise FileExistsError(f"{out} exists and is not an index: it has no {_MANIFEST}; choose another folder")
    mark, width = embeddings_mark(model, model_path), model.config.embed_dim
    items, failures = image_items(mark, find_images(root), root)
    old = read_index(out) if out.exists() else None
    old_rows = {key: row for row, key in enumerate(old.keys)} if old and old.fingerprint == mark else {}
    store = Store(out.parent / f"{out.name}.partial", width)
    failures += embed_images(model, [item for item in items if item.key not in old_rows], store, batch_size)
    done = [item for item in items if item.key in old_rows or item.key in store]
    if not done:
        raise ValueError(f"{root}: all {len(failures)} images are unusable; {failures[0].name}: {failures[0].reason}")

    def rows() -> Iterator[Embeddings]:
        for item in done:
            yield old.embeddings[old_rows[item.key]] if old and item.key in old_rows else store.row(item.key)

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
            "activations": model.activations,
            "names": [item.name for item in done],
            "keys": [item.key for item in done],
        }
        # Written last: on an object store, the index exists once its manifest does.
        (building / _MANIFEST).write_text(json.dumps(fields))
    store.remove()
    return Indexed(len(done), sum(item.key in old_rows for item in done), failures)


def read_index(path: epath.PathLike) -> Index:
    """Read an index. The embeddings of a local index are memory-mapped.

    Raises:
      FileNotFoundError: `path` is not an index.
      ValueError: the index is damaged or has another version.
    """
    path = epath.Path(path)
    if not (path / _MANIFEST).exists():
        raise FileNotFoundError(f"{path}/{_MANIFEST}: no such file; expected an index made by `tclip search index`")
    try:
        fields = json.loads((path / _MANIFEST).read_text())
        version = fields["format_version"]
        if fields["format"] != "tclip-index" or version != _VERSION:
            raise ValueError(
                f"format {fields['format']!r} version {version!r}, expected 'tclip-index' version {_VERSION}"
            )
        names, keys, activations = fields["names"], fields["keys"], fields.get("activations", "A32")
        if activations not in get_args(Activations):
            raise ValueError(f"activations are {activations!r}: they must be {', '.join(get_args(Activations))}")
        # The results page embeds the files at these paths, so they must stay inside the folder.
        if any(os.path.isabs(name) or ".." in name.split("/") for name in names):
            raise ValueError("names must be paths inside its root")
        embeddings = _mapped(path / _EMBEDDINGS)
        if embeddings.dtype != np.float32 or embeddings.ndim != 2 or not len(embeddings) == len(names) == len(keys):
            kind = f"{embeddings.dtype} {embeddings.shape}"
            raise ValueError(f"{_EMBEDDINGS} is {kind}, expected {len(names)} rows of float32")
        root = epath.Path(fields["root"])
        return Index(root, fields["model"], fields["fingerprint"], activations, names, keys, embeddings)
    except (KeyError, TypeError, AttributeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a valid index: {type(error).__name__}: {error}") from None


def _mapped(path: epath.Path) -> npt.NDArray[Any]:
    if is_local(path):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)


class Result(NamedTuple):
    """A search result.

    Attributes:
      name: path of the picture, relative to the root of the index.
      score: cosine similarity to the query.
    """

    name: str
    score: float


def query_index(model: Model, index: Index, query: str | epath.Path, top: int = 20, *, model_path: str) -> list[Result]:
    """Return the pictures nearest to a query, the nearest first.

    Args:
      model: the model of the index, with its activations.
      index: the index.
      query: a text, or the path of a picture.
      top: number of results.
      model_path: where the model was loaded from.

    Raises:
      ValueError: another model made the index, the picture is unusable, or `top` is not positive.
    """
    if top < 1:
        raise ValueError(f"top is {top}: it must be 1 or more")
    if embeddings_mark(model, model_path) != index.fingerprint:
        raise ValueError(f"another model made the index ({index.model}); index the folder again with this model")
    if isinstance(query, str):
        (embedding,) = model.encode_text([query])
    else:
        (embedding,) = model.encode_image(query)
    rows, scores = nearest(index.embeddings, embedding, top)
    return [Result(index.names[row], float(score)) for row, score in zip(rows, scores, strict=True)]


def nearest(embeddings: Embeddings, query: Embeddings, top: int) -> tuple[npt.NDArray[np.int64], Embeddings]:
    """Find the rows with the largest dot products with a query, reading the embeddings chunk by chunk.

    Args:
      embeddings: (N, D).
      query: (D,).
      top: number of rows.

    Returns:
      The row indices and their dot products, both (min(top, N),), in descending order; of equal ones the lower index
      first.
    """
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(embeddings), _CHUNK):
        chunk = embeddings[start : start + _CHUNK] @ query
        rows = np.concatenate([rows, np.arange(start, start + len(chunk))])
        scores = np.concatenate([scores, chunk])
        best = np.lexsort((rows, -scores))[:top]
        rows, scores = rows[best], scores[best]
    return rows, scores


def results_page(
    query: str, facts: str, results: Sequence[tuple[epath.Path, str, float]], picture: epath.Path | None = None
) -> str:
    """Return one self-contained HTML page with search results.

    Args:
      query: the query text, or the path of the query picture.
      facts: a line about the search.
      results: (file, name, similarity) of each result, in order.
      picture: the query picture; None for a text.
    """
    cards = [
        f"<figure>{_thumbnail(path)}<figcaption><b>{rank}. {score:.3f}</b><br>{html.escape(printable(name))}"
        "</figcaption></figure>"
        for rank, (path, name, score) in enumerate(results, 1)
    ]
    query_card = f'<div class="cards"><figure>{_thumbnail(picture)}</figure></div>' if picture else ""
    body = f'{query_card}{paragraph(printable(facts), "note")}<div class="cards">{"".join(cards)}</div>'
    return page(printable(query), body)


def _thumbnail(path: epath.Path) -> str:
    """Return an img element of the picture, rotated by its EXIF orientation, or a note if it is unreadable."""
    try:
        image = ImageOps.exif_transpose(decode(path.read_bytes()))
    except (OSError, ValueError):
        return blank("no longer readable")
    opaque = image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info
    small = ' class="small"' if max(image.size) < _PIXELATED else ""
    image = image.convert("RGB" if opaque else "RGBA")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # JPEG would blur the visible pixels of small images.
    kind = "jpeg" if opaque and not small else "png"
    image.save(buffer, kind)
    return f'<img{small} alt="" src="{data_uri(buffer.getvalue(), kind)}">'
