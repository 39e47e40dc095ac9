"""Test images of the 41 data sets from TensorFlow Datasets (TFDS), with class names from their webdataset exports."""

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
from tclip_jax.evaluation.suite import Dataset

Example = Mapping[str, Any]

# These data sets are a part of a TFDS split. TFDS shuffles splits, so the part may hold other images than the export,
# or one image fewer.
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
_VEHICLES = 3  # the first three object types of KITTI are Car, Van and Truck


class Sample(NamedTuple):
    """A test image with its annotation.

    Attributes:
      image: encoded bytes, or pixels (H, W, 3) uint8.
      label: a class index, or a 0/1 vector over the classes (C,) int32; −1 for retrieval.
      captions: the captions; empty except for retrieval.
    """

    image: bytes | npt.NDArray[np.uint8]
    label: int | npt.NDArray[np.int32]
    captions: tuple[str, ...] = ()


def samples(name: str, example: Example, classes: int) -> list[Sample]:
    """Convert a TFDS example to samples: one per object for voc2007, else one.

    Args:
      name: name of the data set in `DATASETS`.
      example: a decoded TFDS example whose image is still encoded.
      classes: number of classes of the data set.
    """
    if name == "voc2007":
        return list(_objects(example))
    if name == "voc2007_multilabel":
        return [Sample(example["image"], _multi_hot(example, classes))]
    if name == "mscoco_captions":
        return [Sample(example["image"], -1, tuple(text.decode() for text in example["captions"]["text"]))]
    image = _black_and_white(example["image"]) if name.startswith("vtab/dsprites") else example["image"]
    return [Sample(image, _LABELS.get(name, _attribute("label"))(example))]


def count(name: str, example: Example) -> int:
    """Return how many samples `samples` makes of an example, without decoding the image."""
    return len(example["objects"]["label"]) if name == "voc2007" else 1


def clevr_count(example: Example) -> int:
    """Return the number of objects in the scene minus 3: scenes have 3 to 10 objects.

    Source: VTAB's task CLEVR-Count, arXiv 1910.04867; task_adaptation/data/clevr.py.
    """
    return len(example["objects"]["size"]) - 3


def clevr_distance(example: Example) -> int:
    """Return the bin of the distance to the closest object: the minimum third component of `pixel_coords`.

    The bins are (0, 8], (8, 8.5], …, (9.5, 10], (10, 100].

    Source: VTAB's task CLEVR-Distance, arXiv 1910.04867; task_adaptation/data/clevr.py.
    """
    return _bin(np.min(np.asarray(example["objects"]["pixel_coords"])[:, 2]), _CLEVR_DISTANCES)


def kitti_distance(example: Example) -> int:
    """Return the bin of the distance to the closest car, van or truck: up to 8 m, up to 20 m, farther, or no vehicle.

    Source: VTAB's task KITTI-Dist, arXiv 1910.04867; clip_benchmark/datasets/kitti.py, task_adaptation/data/kitti.py.
    """
    objects = example["objects"]
    distances = np.asarray(objects["location"], np.float32).reshape(-1, 3)[:, 2]
    vehicles = distances[np.asarray(objects["type"]) < _VEHICLES]
    return _bin(min(vehicles, default=_NO_VEHICLE), _KITTI_DISTANCES)


def imagenet_subset(classes: tuple[int, ...]) -> Callable[[Example], int]:
    """Return a function from an example to the index of its ImageNet label in `classes`, or −1."""
    indices = {label: index for index, label in enumerate(classes)}
    return lambda example: indices.get(int(example["label"]), -1)


def _bin(value: float, ends: tuple[float, ...]) -> int:
    return int(np.searchsorted(ends, float(value), side="left")) - 1


def _attribute(name: str) -> Callable[[Example], int]:
    return lambda example: int(example[name])


def _black_and_white(image: bytes) -> npt.NDArray[np.uint8]:
    """Scale the pixels of dSprites from 0 and 1 to 0 and 255. Source: task_adaptation/data/dsprites.py."""
    return np.repeat(np.atleast_3d(np.asarray(decode(image)))[..., :1] * np.uint8(255), 3, axis=-1)


def _objects(example: Example) -> Iterator[Sample]:
    """Crop every object, including difficult ones, by its box. Source: clip_benchmark/datasets/voc2007.py."""
    image = decode(example["image"]).convert("RGB")
    size = np.array([image.height, image.width] * 2)
    for label, box in zip(example["objects"]["label"], example["objects"]["bbox"], strict=True):
        top, left, bottom, right = (int(end) for end in np.rint(np.asarray(box, np.float64) * size))
        yield Sample(np.asarray(image.crop((left, top, right, bottom))), int(label))


def _multi_hot(example: Example, classes: int) -> npt.NDArray[np.int32]:
    """Mark the classes of all objects, including difficult ones. Source: clip_benchmark/datasets/voc2007.py."""
    return np.isin(np.arange(classes), example["labels"]).astype(np.int32)


# Indices of the classes of ImageNet-A and ImageNet-R among the 1,000 classes of ImageNet, sorted by WordNet id.
# Sources: D. Hendrycks et al., "Natural Adversarial Examples", arXiv 1907.07174; "The Many Faces of Robustness", arXiv
# 2006.16241.
# fmt: off
IMAGENET_A = (
    6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70, 71, 76, 79, 89, 90, 94, 96, 97, 99, 105, 107, 108,
    110, 113, 124, 125, 130, 132, 143, 144, 150, 151, 207, 234, 235, 254, 277, 283, 287, 291, 295, 298, 301, 306, 307,
    308, 309, 310, 311, 313, 314, 315, 317, 319, 323, 324, 326, 327, 330, 334, 335, 336, 347, 361, 363, 372, 378, 386,
    397, 400, 401, 402, 404, 407, 411, 416, 417, 420, 425, 428, 430, 437, 438, 445, 456, 457, 461, 462, 470, 472, 483,
    486, 488, 492, 496, 514, 516, 528, 530, 539, 542, 543, 549, 552, 557, 561, 562, 569, 572, 573, 575, 579, 589, 606,
    607, 609, 614, 626, 627, 640, 641, 642, 643, 658, 668, 677, 682, 684, 687, 701, 704, 719, 736, 746, 749, 752, 758,
    763, 765, 768, 773, 774, 776, 779, 780, 786, 792, 797, 802, 803, 804, 813, 815, 820, 823, 831, 833, 835, 839, 845,
    847, 850, 859, 862, 870, 879, 880, 888, 890, 897, 900, 907, 913, 924, 932, 933, 934, 937, 943, 945, 947, 951, 954,
    956, 957, 959, 971, 972, 980, 981, 984, 986, 987, 988,
)
IMAGENET_R = (
    1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84, 90, 94, 96, 97, 99, 100, 105, 107, 113,
    122, 125, 130, 132, 144, 145, 147, 148, 150, 151, 155, 160, 161, 162, 163, 171, 172, 178, 187, 195, 199, 203, 207,
    208, 219, 231, 232, 234, 235, 242, 245, 247, 250, 251, 254, 259, 260, 263, 265, 267, 269, 276, 277, 281, 288, 289,
    291, 292, 293, 296, 299, 301, 308, 309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340, 341, 344,
    347, 353, 355, 361, 362, 365, 366, 367, 368, 372, 388, 390, 393, 397, 401, 407, 413, 414, 425, 428, 430, 435, 437,
    441, 447, 448, 457, 462, 463, 469, 470, 471, 472, 476, 483, 487, 515, 546, 555, 558, 570, 579, 583, 587, 593, 594,
    596, 609, 613, 617, 621, 629, 637, 657, 658, 701, 717, 724, 763, 768, 774, 776, 779, 780, 787, 805, 812, 815, 820,
    824, 833, 847, 852, 866, 875, 883, 889, 895, 907, 928, 931, 932, 933, 934, 936, 937, 943, 945, 947, 948, 949, 951,
    953, 954, 957, 963, 965, 967, 980, 981, 983, 988,
)
# fmt: on

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
    """The test images of a data set, prepared by `tfds build` as ArrayRecord and read without TensorFlow.

    Args:
      dataset: the data set.
      data_dir: folder of the prepared TensorFlow Datasets; None for the default of TFDS.
      names: folder with the class names and templates of the webdataset export.

    Attributes:
      kind: classification, multilabel or retrieval.
      classnames: lines of classnames.txt in `names`; empty for retrieval.
      templates: lines of zeroshot_classification_templates.txt in `names`; empty for retrieval.

    Raises:
      FileNotFoundError: the data is not prepared, or `names` lacks a file.
      ValueError: TFDS does not have the data set or prepared it in another format, or the number of names differs from
        the number of classes.
    """

    kind: Kind
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    def __init__(self, dataset: Dataset, data_dir: epath.PathLike | None, names: epath.PathLike) -> None:
        if dataset.tfds is None:
            raise ValueError(f"{dataset.name}: not in TensorFlow Datasets; use its webdataset export")
        self._dataset, self.kind = dataset, dataset.kind
        retrieval = self.kind == "retrieval"
        self.classnames = () if retrieval else _lines(names, CLASSNAMES)
        self.templates = () if retrieval else _lines(names, TEMPLATES)
        if len(self.classnames) != dataset.classes:
            raise ValueError(
                f"{names}/{CLASSNAMES}: {len(self.classnames)} names, but {dataset.name} has {dataset.classes} classes"
            )
        name, split = dataset.tfds
        _, self._records = open_prepared(name, split, os.fspath(data_dir or ""))
        self._name = f"tfds:{name}/{split}"
        # In voc2007 every object is a sample, so an index is located by the cumulative number of objects.
        self._ends = None
        if dataset.name == "voc2007":
            self._ends = np.cumsum([count(dataset.name, each) for each in self._records])

    def __len__(self) -> int:
        return len(self._records) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        number, offset = index, 0
        if self._ends is not None:
            number = int(np.searchsorted(self._ends, index, side="right"))
            offset = index - (int(self._ends[number - 1]) if number else 0)
        name = f"{self._name}/{index}"
        record = read_record(self._records, number, name)
        sample = samples(self._dataset.name, record, self._dataset.classes)[offset]
        return Record(sample.image, sample.captions, sample.label, name)


def _lines(folder: epath.PathLike, name: str) -> tuple[str, ...]:
    path = epath.Path(folder) / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; TFDS provides only the images, the webdataset export the class names"
        )
    return tuple(read_lines(path))
