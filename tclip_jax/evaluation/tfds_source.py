"""Rows of the table of 41 from TensorFlow Datasets, with the names and templates of their webdataset exports."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.data.files import read_lines
from tclip_jax.data.images import decode
from tclip_jax.data.sources import Record
from tclip_jax.data.sources.tfds import open_prepared, read_record
from tclip_jax.data.sources.webdataset import CLASSNAMES, TEMPLATES, Kind
from tclip_jax.evaluation.imagenet_subsets import IMAGENET_A, IMAGENET_R
from tclip_jax.evaluation.suite import Dataset

Example = Mapping[str, Any]

# The same number of images, or one fewer, drawn or ordered otherwise than in the export: TFDS shuffles what it
# prepares, and these rows are a part of it.
MAY_DIFFER = frozenset(
    {
        "sun397",
        "vtab/dsprites_label_orientation",
        "vtab/dsprites_label_x_position",
        "vtab/dsprites_label_y_position",
        "vtab/eurosat",
        "vtab/kitti_closest_vehicle_distance",
        "vtab/resisc45",
        "vtab/smallnorb_label_azimuth",
        "vtab/smallnorb_label_elevation",
    }
)

_CLEVR_DISTANCES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
_KITTI_DISTANCES = (-100.0, 8.0, 20.0, 999.0)
_NO_VEHICLE = 1000.0
_VEHICLES = 3  # Car, Van and Truck are the first of KITTI's types


class Sample(NamedTuple):
    """One image for the model.

    Attributes:
      image: encoded bytes, or pixels (H, W, 3) uint8.
      label: a class, or a 0/1 vector over the classes (C,) int32; −1 for captions.
      captions: of a row of retrieval.
    """

    image: bytes | npt.NDArray[np.uint8]
    label: int | npt.NDArray[np.int32]
    captions: tuple[str, ...] = ()


def samples(name: str, example: Example, classes: int) -> list[Sample]:
    """What the row `name` makes of an example whose images are encoded: one sample, or of voc2007 one per object.

    Args:
      classes: of the row.
    """
    if name == "voc2007":
        return list(_objects(example))
    if name == "voc2007_multilabel":
        return [Sample(example["image"], _multi_hot(example, classes))]
    if name == "mscoco_captions":
        return [Sample(example["image"], -1, tuple(text.decode() for text in example["captions"]["text"]))]
    image = _spread(example["image"]) if name.startswith("vtab/dsprites") else example["image"]
    return [Sample(image, _LABELS.get(name, _plain)(example))]


def count(name: str, example: Example) -> int:
    """How many samples that will be, without decoding the image."""
    return len(example["objects"]["label"]) if name == "voc2007" else 1


def clevr_count(example: Example) -> int:
    """Objects in the scene, of which there are 3 to 10, from 0.

    Source: VTAB's task CLEVR-Count, arXiv 1910.04867; task_adaptation/data/clevr.py.
    """
    return len(example["objects"]["size"]) - 3


def clevr_distance(example: Example) -> int:
    """The bin of the distance to the closest object, the least third component of `pixel_coords`.

    A bin is what is over its lower end and up to its upper: (0, 8], (8, 8.5], …, (9.5, 10], (10, 100].

    Source: VTAB's task CLEVR-Distance, arXiv 1910.04867; task_adaptation/data/clevr.py.
    """
    return _bin(np.min(np.asarray(example["objects"]["pixel_coords"])[:, 2]), _CLEVR_DISTANCES)


def kitti_distance(example: Example) -> int:
    """The bin of the distance to the closest car, van or truck: up to 8 m, up to 20 m, farther, or no vehicle.

    Source: VTAB's task KITTI-Dist, arXiv 1910.04867; clip_benchmark/datasets/kitti.py, task_adaptation/data/kitti.py.
    """
    objects = example["objects"]
    distances = np.asarray(objects["location"], np.float32).reshape(-1, 3)[:, 2]
    vehicles = distances[np.asarray(objects["type"]) < _VEHICLES]
    return _bin(min(vehicles, default=_NO_VEHICLE), _KITTI_DISTANCES)


def imagenet_subset(classes: tuple[int, ...]) -> Callable[[Example], int]:
    """From a label among all 1,000 classes to its place among these; −1 for one that is not of them."""
    places = {label: place for place, label in enumerate(classes)}
    return lambda example: places.get(int(example["label"]), -1)


def _bin(value: float, ends: tuple[float, ...]) -> int:
    return int(np.searchsorted(ends, float(value), side="left")) - 1


def _plain(example: Example) -> int:
    return int(example["label"])


def _attribute(name: str) -> Callable[[Example], int]:
    return lambda example: int(example[name])


def _spread(image: bytes) -> npt.NDArray[np.uint8]:
    """dSprites' pixels of 0 and 1 as black and white. Source: task_adaptation/data/dsprites.py."""
    return np.repeat(np.atleast_3d(np.asarray(decode(image)))[..., :1] * np.uint8(255), 3, axis=-1)


def _objects(example: Example) -> Iterator[Sample]:
    """Every object, difficult ones too, cut out by its box. Source: clip_benchmark/datasets/voc2007.py."""
    image = decode(example["image"]).convert("RGB")
    size = np.array([image.height, image.width] * 2)
    for label, box in zip(example["objects"]["label"], example["objects"]["bbox"], strict=True):
        top, left, bottom, right = (int(end) for end in np.rint(np.asarray(box, np.float64) * size))
        yield Sample(np.asarray(image.crop((left, top, right, bottom))), int(label))


def _multi_hot(example: Example, classes: int) -> npt.NDArray[np.int32]:
    """A class is there if any object, difficult ones too, is of it. Source: clip_benchmark/datasets/voc2007.py."""
    return np.isin(np.arange(classes), example["labels"]).astype(np.int32)


_LABELS: dict[str, Callable[[Example], int]] = {
    "imagenet-a": imagenet_subset(IMAGENET_A),
    "imagenet-r": imagenet_subset(IMAGENET_R),
    "vtab/clevr_count_all": clevr_count,
    "vtab/clevr_closest_object_distance": clevr_distance,
    "vtab/kitti_closest_vehicle_distance": kitti_distance,
    "vtab/dsprites_label_orientation": _attribute("label_orientation"),
    "vtab/dsprites_label_x_position": _attribute("label_x_position"),
    "vtab/dsprites_label_y_position": _attribute("label_y_position"),
    "vtab/smallnorb_label_azimuth": _attribute("label_azimuth"),
    "vtab/smallnorb_label_elevation": _attribute("label_elevation"),
}


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
