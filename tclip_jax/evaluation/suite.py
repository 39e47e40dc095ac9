"""Table of the 41 data sets of the paper: the webdataset exports of CLIP_benchmark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tclip_jax.data.sources.webdataset import Kind
from tclip_jax.schema import check_keys

MAIN_METRIC: dict[Kind, str] = {
    "classification": "acc1",
    "multilabel": "mean_average_precision",
    "retrieval": "image_retrieval_recall@5",
}


def main_metric(metrics: Iterable[str]) -> str:
    """Return the main metric among `metrics`, else the first one; "" if there are none."""
    metrics = list(metrics)
    return next((metric for metric in (*MAIN_METRIC.values(), *metrics) if metric in metrics), "")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set to evaluate.

    Attributes:
      name: its name in CLIP_benchmark.
      samples: number of test images; 0 if unknown.
      classes: number of classes; 0 for retrieval.
      tfds: (name with configuration, split) of the same data in TensorFlow Datasets; None if it is not there.
      kind: the kind of evaluation.
      averaged: the metric that OpenAI and DataComp average; CLIP_benchmark averages `main_metric`.
    """

    name: str
    samples: int
    classes: int
    tfds: tuple[str, str] | None = None
    kind: Kind = "classification"
    averaged: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "averaged", self.averaged or self.main_metric)

    @property
    def main_metric(self) -> str:
        """The metric that tables show."""
        return MAIN_METRIC[self.kind]

    @property
    def task(self) -> str:
        """The task name in CLIP_benchmark."""
        return "zeroshot_retrieval" if self.kind == "retrieval" else "zeroshot_classification"

    @property
    def stem(self) -> str:
        """The name in file names."""
        return self.name.replace("/", "-")

    @property
    def folder(self) -> str:
        """Folder of the webdataset export: in the root, and in `clip-benchmark/` on the Hugging Face hub."""
        return f"wds_{self.stem}"


_PER_CLASS = "mean_per_class_recall"
_DSPRITES = ("dsprites", "train[90%:]")
_SMALLNORB = ("smallnorb", "test[50%:]")

_ROWS = (
    Dataset("imagenet1k", 50000, 1000, ("imagenet2012", "validation")),
    Dataset("imagenetv2", 10000, 1000, ("imagenet_v2/matched-frequency", "test")),
    Dataset("imagenet_sketch", 50889, 1000, ("imagenet_sketch", "test")),
    Dataset("imagenet-a", 7500, 200, ("imagenet_a", "test")),
    Dataset("imagenet-r", 30000, 200, ("imagenet_r", "test")),
    Dataset("imagenet-o", 2000, 200),
    Dataset("objectnet", 18574, 113),
    Dataset("fer2013", 7178, 7),
    Dataset("voc2007", 14976, 20, ("voc/2007", "test")),
    Dataset("voc2007_multilabel", 4952, 20, ("voc/2007", "test"), "multilabel"),
    Dataset("sun397", 108754, 397, ("sun397/tfds", "train+validation+test")),
    Dataset("cars", 8041, 196, ("cars196", "test")),
    Dataset("fgvc_aircraft", 3333, 100, averaged=_PER_CLASS),
    Dataset("mnist", 10000, 10, ("mnist", "test")),
    Dataset("stl10", 8000, 10, ("stl10", "test")),
    Dataset("gtsrb", 12630, 43),
    Dataset("country211", 21100, 211),
    Dataset("renderedsst2", 1821, 2),
    Dataset("vtab/caltech101", 6084, 102, ("caltech101", "test"), averaged=_PER_CLASS),
    Dataset("vtab/cifar10", 10000, 10, ("cifar10", "test")),
    Dataset("vtab/cifar100", 10000, 100, ("cifar100", "test")),
    Dataset("vtab/clevr_count_all", 15000, 8, ("clevr", "validation")),
    Dataset("vtab/clevr_closest_object_distance", 15000, 6, ("clevr", "validation")),
    Dataset("vtab/diabetic_retinopathy", 42670, 5, ("diabetic_retinopathy_detection/btgraham-300", "test")),
    Dataset("vtab/dmlab", 22735, 6, ("dmlab", "test")),
    Dataset("vtab/dsprites_label_orientation", 73728, 40, _DSPRITES),
    Dataset("vtab/dsprites_label_x_position", 73728, 32, _DSPRITES),
    Dataset("vtab/dsprites_label_y_position", 73728, 32, _DSPRITES),
    Dataset("vtab/dtd", 1880, 47, ("dtd", "test")),
    Dataset("vtab/eurosat", 5400, 10, ("eurosat/rgb", "train[21600:]")),
    Dataset("vtab/kitti_closest_vehicle_distance", 711, 4, ("kitti", "test")),
    Dataset("vtab/flowers", 6149, 102, ("oxford_flowers102", "test"), averaged=_PER_CLASS),
    Dataset("vtab/pets", 3669, 37, ("oxford_iiit_pet", "test"), averaged=_PER_CLASS),
    Dataset("vtab/pcam", 32768, 2, ("patch_camelyon", "test")),
    Dataset("vtab/resisc45", 6300, 45, ("resisc45", "train[80%:]")),
    Dataset("vtab/smallnorb_label_azimuth", 12150, 18, _SMALLNORB),
    Dataset("vtab/smallnorb_label_elevation", 12150, 9, _SMALLNORB),
    Dataset("vtab/svhn", 26032, 10, ("svhn_cropped", "test")),
    Dataset("mscoco_captions", 5000, 0, ("coco_captions/2014", "test"), "retrieval"),
    Dataset("flickr8k", 1000, 0, kind="retrieval"),
    Dataset("flickr30k", 1000, 0, kind="retrieval"),
)
DATASETS: dict[str, Dataset] = {row.name: row for row in _ROWS}

# As CLIP_benchmark's collection `vtab`: the 19 tasks of VTAB, with sun397 under its own name.
_NOT_VTAB = {"vtab/cifar10", "vtab/dsprites_label_y_position"}
SUITES: dict[str, tuple[str, ...]] = {
    "clip-benchmark-41": tuple(DATASETS),
    "imagenet": tuple(name for name in DATASETS if name.startswith("imagenet") or name == "objectnet"),
    "vtab": tuple(n for n in DATASETS if n == "sun397" or (n.startswith("vtab/") and n not in _NOT_VTAB)),
    "retrieval": tuple(row.name for row in _ROWS if row.kind == "retrieval"),
}


def find_datasets(names: str) -> tuple[Dataset, ...]:
    """Return the data sets of a comma-separated list of suites and data sets, in that order and without duplicates.

    Raises:
      ValueError: a name is unknown; the message suggests the nearest one.
    """
    datasets: dict[str, Dataset] = {}
    for name in names.split(","):
        check_keys([name.strip()], [*SUITES, *DATASETS], "the table of suites and data sets")
        datasets |= {each: DATASETS[each] for each in SUITES.get(name.strip(), (name.strip(),))}
    return tuple(datasets.values())
