"""Webdataset exports, and a fake encoder that needs no compilation."""

from __future__ import annotations

import io
import pathlib
import shutil
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from tclip_jax.data.images import Preprocess
from tests.tars import write_tar

TEMPLATES = ("a photo of a {c}.", "{c}", "a bad drawing of the {c}")


def picture(number: int, suffix: str = "png") -> bytes:
    """Return an image file whose size and content depend on `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 5, 12, 3), np.uint8)
    buffer = io.BytesIO()
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix), **options)
    return buffer.getvalue()


def npy(vector: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(vector))
    return buffer.getvalue()


def write_export(
    folder: pathlib.Path,
    targets: Sequence[Any],
    classnames: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    *,
    suffix: str = "png",
    shards: int = 2,
    images: Mapping[int, bytes] | None = None,
) -> pathlib.Path:
    """Write a folder in the format of `clip_benchmark_export_wds`.

    Args:
      targets: the target of each sample: a class, a 0/1 vector or captions.
      images: replacement image files by sample index.
    """
    members: list[dict[str, bytes]] = [{} for _ in range(shards)]
    kind = {int: "cls", list: "txt", np.ndarray: "npy"}[type(targets[0])]
    for i, target in enumerate(targets):
        text = "\n".join(target) if kind == "txt" else str(target)
        members[i * shards // len(targets)] |= {
            f"s{i:07}.{suffix}": (images or {}).get(i, picture(i, suffix)),
            f"s{i:07}.{kind}": npy(target) if kind == "npy" else text.encode(),
        }
    for number, shard in enumerate(members):
        write_tar(folder / "test" / f"{number}.tar", shard.items())
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    if kind == "txt":
        (folder / "dataset_type.txt").write_text("retrieval\n")
        return folder
    if kind == "npy":
        (folder / "dataset_type.txt").write_text("multilabel\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classnames))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    return folder


class Direct:
    """A fake encoder whose embeddings are random, with a seed from the bytes of the text or image.

    Attributes:
      encoded: all texts that were encoded.

    Args:
      table: text embeddings by text; the embedding of an image is then its mean colour.
    """

    preprocess = Preprocess(4)
    dtype = "float32"

    def __init__(self, batch_size: int = 8, table: Mapping[str, Sequence[float]] | None = None) -> None:
        self.batch_size, self._table = batch_size, table
        self.encoded: list[str] = []

    @property
    def made_by(self) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.encoded += texts
        if self._table is not None:
            return _units(np.array([self._table[text] for text in texts]))
        return _units(np.array([np.random.default_rng([*text.encode(), 1]).normal(size=6) for text in texts]))

    def images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        assert pixels.shape[0] == self.batch_size and pixels.dtype == np.uint8, "batches have one shape"
        if self._table is not None:
            return _units(pixels.mean(axis=(1, 2)))
        return _units(np.array([np.random.default_rng(each.ravel()).normal(size=6) for each in pixels]))


def _units(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


class Hub:
    """A fake `huggingface_hub.snapshot_download` of the exports in a folder, with the hub's own matching of patterns.

    Attributes:
      requested: the requested repositories, without duplicates.
      stop_at: name of the file whose download fails.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root, self.requested, self.stop_at = root, list[str](), ""

    def __call__(self, repo_id: str, *, repo_type: str, local_dir: str, allow_patterns: list[str]) -> None:
        assert repo_type == "dataset"
        self.requested = [*dict.fromkeys([*self.requested, repo_id])]
        there = self.root / repo_id.removeprefix("clip-benchmark/")
        if not there.exists():
            raise OSError("Repository not found\nand more lines")
        # Small files arrive first.
        paths = sorted(there.rglob("*.*"), key=lambda path: path.stat().st_size)
        files = [str(path.relative_to(there)) for path in paths]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            if name == self.stop_at:
                raise OSError("Connection reset")
            target = pathlib.Path(local_dir) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, target)


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A fake hub with the exports in `tmp_path / "hub"`."""
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


@pytest.fixture
def exports() -> types.SimpleNamespace:
    """The functions and classes above, as a fixture."""
    return types.SimpleNamespace(
        write=write_export, write_tar=write_tar, picture=picture, npy=npy, Direct=Direct, TEMPLATES=TEMPLATES
    )
