"""A row of the table of 41 from TensorFlow Datasets, with the names and templates of its webdataset export."""

from __future__ import annotations

import os

import numpy as np
from etils import epath

from tclip_jax.data.files import read_lines
from tclip_jax.data.sources import Record
from tclip_jax.data.sources.tfds import open_prepared, read_record
from tclip_jax.data.sources.webdataset import CLASSNAMES, TEMPLATES, Kind
from tclip_jax.evaluation.suite import Dataset
from tclip_jax.evaluation.tfds_rows import count, samples


class TfdsRow:
    """The test images of a row, prepared by `tfds build` as ArrayRecord, read without TensorFlow.

    Attributes:
      kind: classification, multilabel or retrieval, as of `Webdataset`.
      classnames: the lines of classnames.txt in `names`; empty for captions.
      templates: those of zeroshot_classification_templates.txt there; empty for captions.

    Raises:
      FileNotFoundError: the data is not prepared, or `names` lacks a file.
      ValueError: TFDS has no such row, prepared it otherwise, or there is another number of names than of classes.
    """

    kind: Kind
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def __init__(self, dataset: Dataset, data_dir: epath.PathLike | None, names: epath.PathLike) -> None:
        if dataset.tfds is None:
            raise ValueError(f"{dataset.name}: TensorFlow Datasets have no such data; use its webdataset export")
        self._dataset, self.kind = dataset, dataset.kind
        retrieval = self.kind == "retrieval"
        self.classnames = () if retrieval else _lines(names, CLASSNAMES)
        self.templates = () if retrieval else _lines(names, TEMPLATES)
        if len(self.classnames) != dataset.classes:
            raise ValueError(
                f"{names}/{CLASSNAMES}: {len(self.classnames)} names, where {dataset.name} has {dataset.classes}"
            )
        name, split = dataset.tfds
        _, self._records = open_prepared(name, split, os.fspath(data_dir or ""))
        self._name = f"tfds:{name}/{split}"
        # An image is one sample except where every object is: then all annotations are read once.
        self._ends = None
        if dataset.name == "voc2007":
            self._ends = np.cumsum([count(dataset.name, each) for each in self._records])

    def __len__(self) -> int:
        return len(self._records) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number, place = index, 0
        if self._ends is not None:
            number = int(np.searchsorted(self._ends, index, side="right"))
            place = index - (int(self._ends[number - 1]) if number else 0)
        name = f"{self._name}/{index}"
        record = read_record(self._records, number, name)
        found = samples(self._dataset.name, record, self._dataset.classes)[place]
        return Record(found.image, found.captions, found.label, name)


def _lines(folder: epath.PathLike, name: str) -> tuple[str, ...]:
    path = epath.Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file: TFDS has the images, its webdataset export the names")
    return tuple(read_lines(path))
