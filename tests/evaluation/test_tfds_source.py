"""Labels of every data set that TFDS has, on dicts like its examples and on ArrayRecord files that it wrote."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.suite import DATASETS, Dataset
from tclip_jax.evaluation.tasks import suite_tasks
from tclip_jax.evaluation.tfds_source import (
    IMAGENET_A,
    IMAGENET_R,
    MAY_DIFFER,
    TfdsRow,
    clevr_distance,
    kitti_distance,
    samples,
)

VOC = ("aeroplane", "bicycle", "bird", "boat")
KITTI = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")
F = tfds.features


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


GREY = np.arange(36, dtype=np.uint8).reshape(6, 6)
RGB = np.arange(20 * 30 * 3, dtype=np.uint16).astype(np.uint8).reshape(20, 30, 3)


def vtab_bin(distance: float, thresholds: Sequence[float]) -> int:
    """Return the last threshold below the distance, as VTAB defines bins."""
    return int(np.max(np.where(np.array(thresholds) - distance < 0)))


@pytest.mark.parametrize("distance", [0.1, 7.99, 8.0, 8.0001, 8.5, 9.2, 9.5, 9.75, 10.0, 10.01, 40.0])
def test_clevr_distance(distance: float) -> None:
    coordinates = np.float32([[5, 5, distance + 3], [1, 2, distance], [-9, -9, distance + 0.5]])
    expected = vtab_bin(np.float32(distance), [0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
    assert clevr_distance({"objects": {"pixel_coords": coordinates}}) == expected


@pytest.mark.parametrize(
    ("types", "distances", "label"),
    [
        ([3, 0], [1.0, 8.0], 0),  # the closer object is a pedestrian
        ([0, 1], [30.0, 8.01], 1),
        ([2, 7], [20.0, 2.0], 1),
        ([1], [20.01], 2),
        ([0], [-2.0], 0),
        ([6, 5], [3.0, 4.0], 3),  # a tram is not a vehicle
        ([], [], 3),
    ],
)
def test_kitti_distance(types: list[int], distances: list[float], label: int) -> None:
    location = np.float32([[0, 0, z] for z in distances])
    assert kitti_distance({"objects": {"type": np.array(types), "location": location}}) == label
    vehicles = [z for kind, z in zip(types, distances, strict=True) if kind < 3]
    assert label == vtab_bin(min([*vehicles, 1000.0]), [-100.0, 8.0, 20.0, 999.0])


def test_imagenet_subsets() -> None:
    for name, classes in (("imagenet-a", IMAGENET_A), ("imagenet-r", IMAGENET_R)):
        assert (
            len(set(classes)) == 200 and list(classes) == sorted(classes) and 0 <= min(classes) <= max(classes) < 1000
        )
        labels = [samples(name, {"image": b"", "label": np.int64(label)}, 200)[0].label for label in range(1000)]
        assert [labels[label] for label in classes] == list(range(200)) and labels.count(-1) == 800


@pytest.mark.torch
def test_imagenet_subsets_are_clip_benchmarks() -> None:
    """CLIP_benchmark lists WordNet ids; TFDS lists the ids of all 1,000 classes by label."""
    import ast
    import inspect

    from clip_benchmark.datasets import builder

    everything = (pathlib.Path(tfds.__file__).parent / "datasets/imagenet2012/labels.txt").read_text().split()
    assigned = {
        target.id: node.value
        for node in ast.walk(ast.parse(inspect.getsource(builder)))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name, classes in (("imagenet_a_wnids", IMAGENET_A), ("imagenet_r_wnids", IMAGENET_R)):
        assert [everything[label] for label in classes] == sorted(ast.literal_eval(assigned[name]))


def test_data_sets_that_may_differ_are_in_tfds() -> None:
    assert all(DATASETS[name].tfds for name in MAY_DIFFER)


def prepare(data_dir: pathlib.Path, row: Dataset, features: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    """Write the examples with TFDS, under the name, configuration and split of the data set."""
    full, split = row.tfds
    title, _, configuration = full.partition("/")

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = title
        VERSION = tfds.core.Version("3.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=configuration)] if configuration else []

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {part.partition("[")[0]: self._generate_examples() for part in split.split("+")}

        def _generate_examples(self) -> Any:
            yield from enumerate(examples)

    Prepared(data_dir=data_dir, file_format="array_record").download_and_prepare()


def opened(tmp_path: pathlib.Path, name: str, features: dict[str, Any], examples: list[dict[str, Any]]) -> TfdsRow:
    """Open prepared examples, with the right number of class names."""
    row = DATASETS[name]
    prepare(tmp_path / "tfds", row, features, examples)
    if row.classes:
        (tmp_path / "classnames.txt").write_text("\n".join(f"class {i}" for i in range(row.classes)))
        (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n{c}\n")
    return TfdsRow(row, tmp_path / "tfds", tmp_path)


def image() -> Any:
    return io.BytesIO(png(RGB))


OBJECTS = {
    "clevr": F.Sequence(
        {"size": F.ClassLabel(names=["small", "large"]), "pixel_coords": F.Tensor(shape=(3,), dtype=np.float32)}
    ),
    "kitti": F.Sequence({"type": F.ClassLabel(names=list(KITTI)), "location": F.Tensor(shape=(3,), dtype=np.float32)}),
    "voc": F.Sequence({"label": F.ClassLabel(names=list(VOC)), "bbox": F.BBoxFeature()}),
}
THREE = [{"size": 0, "pixel_coords": np.float32([0, 0, z])} for z in (9.1, 9.7, 12)]
CAR = [{"type": 0, "location": np.float32([0, 0, 15])}, {"type": 3, "location": np.float32([0, 0, 1])}]
LABELLED = {"image": F.Image(shape=(None, None, 3), encoding_format="png"), "label": F.ClassLabel(num_classes=1000)}
IMAGE = {"image": LABELLED["image"]}
SCENE = {**IMAGE, "objects": OBJECTS["clevr"]}
PLAIN = [
    name
    for name, row in DATASETS.items()
    if row.tfds
    and row.kind == "classification"
    and row.tfds[0].split("/")[0] not in ("imagenet_a", "imagenet_r", "voc", "clevr", "dsprites", "kitti", "smallnorb")
]


@pytest.mark.parametrize(
    ("name", "features", "example", "label"),
    [
        ("imagenet-a", LABELLED, {"label": 988}, 199),
        ("imagenet-r", LABELLED, {"label": 6}, 3),
        ("vtab/clevr_count_all", SCENE, {"objects": THREE}, 0),
        ("vtab/clevr_closest_object_distance", SCENE, {"objects": THREE}, 3),
        ("vtab/kitti_closest_vehicle_distance", {**IMAGE, "objects": OBJECTS["kitti"]}, {"objects": CAR}, 1),
        ("vtab/kitti_closest_vehicle_distance", {**IMAGE, "objects": OBJECTS["kitti"]}, {"objects": []}, 3),
        ("mnist", LABELLED, {"label": 7}, 7),
        ("vtab/pcam", LABELLED, {"label": 1}, 1),
        ("sun397", LABELLED, {"label": 396}, 396),
    ],
)
def test_labels(tmp_path: pathlib.Path, name: str, features: Any, example: dict[str, Any], label: int) -> None:
    source = opened(tmp_path, name, features, [{"image": image(), **example} for _ in range(20)])
    assert source[0].label == label and source[0].captions == ()
    assert source[0].image == png(RGB) and source.kind == "classification"
    assert len(source.classnames) == DATASETS[name].classes and source.templates == ("a photo of {c}.", "{c}")
    assert source[0].name == f"tfds:{'/'.join(DATASETS[name].tfds)}/0"


@pytest.mark.parametrize("name", PLAIN)
def test_other_data_sets_keep_the_label_of_tfds(name: str) -> None:
    assert samples(name, {"image": b"x", "label": np.int64(4)}, 10) == [(b"x", 4, ())]


@pytest.mark.parametrize("attribute", ["orientation", "x_position", "y_position"])
def test_dsprites(tmp_path: pathlib.Path, attribute: str) -> None:
    name = f"vtab/dsprites_label_{attribute}"
    bits = GREY % 2
    features = {
        "image": F.Image(shape=(6, 6, 1)),
        f"label_{attribute}": F.ClassLabel(num_classes=DATASETS[name].classes),
    }
    examples = [{"image": io.BytesIO(png(bits)), f"label_{attribute}": 31} for _ in range(20)]
    source = opened(tmp_path, name, features, examples)
    assert len(source) == 2, "the split is the last tenth"
    assert source[1].label == 31
    np.testing.assert_array_equal(source[1].image, np.repeat(255 * bits[..., None], 3, axis=-1))


@pytest.mark.parametrize(("attribute", "label"), [("azimuth", 17), ("elevation", 8)])
def test_smallnorb(tmp_path: pathlib.Path, attribute: str, label: int) -> None:
    name = f"vtab/smallnorb_label_{attribute}"
    features = {
        "image": F.Image(shape=(6, 6, 1)),
        f"label_{attribute}": F.ClassLabel(num_classes=DATASETS[name].classes),
    }
    examples = [{"image": io.BytesIO(png(GREY)), f"label_{attribute}": label} for _ in range(4)]
    source = opened(tmp_path, name, features, examples)
    assert len(source) == 2 and source[0].label == label
    assert source[0].image == png(GREY), "decoding converts grey to three channels"


BOXES = [(2, 3, 12, 25, 1), (0, 0, 20, 30, 3), (5, 5, 6, 9, 1)]  # top, left, bottom, right, class


def voc_example() -> dict[str, Any]:
    objects = [{"bbox": F.BBox(y / 20, x / 30, b / 20, r / 30), "label": c} for y, x, b, r, c in BOXES]
    return {"image": image(), "objects": objects, "labels": [1, 3]}


def test_voc2007_has_a_sample_per_object(tmp_path: pathlib.Path) -> None:
    features = {**IMAGE, "objects": OBJECTS["voc"]}
    empty = {"image": image(), "objects": []}
    examples = [{k: v for k, v in voc_example().items() if k != "labels"}, empty]
    source = opened(tmp_path, "voc2007", features, [examples[0], empty, {**examples[0], "image": image()}])
    assert len(source) == 2 * len(BOXES)
    for i in range(len(source)):
        top, left, bottom, right, label = BOXES[i % 3]
        np.testing.assert_array_equal(source[i].image, RGB[top:bottom, left:right])
        assert source[i].label == label and source[i].name == f"tfds:voc/2007/test/{i}"


def test_voc2007_multilabel(tmp_path: pathlib.Path) -> None:
    features = {**IMAGE, "objects": OBJECTS["voc"], "labels": F.Sequence(F.ClassLabel(names=list(VOC)))}
    source = opened(tmp_path, "voc2007_multilabel", features, [voc_example()])
    assert source.kind == "multilabel"
    np.testing.assert_array_equal(source[0].label, [0, 1, 0, 1, *[0] * 16])


def test_coco_captions(tmp_path: pathlib.Path) -> None:
    features = {**IMAGE, "captions": F.Sequence({"id": np.int64, "text": F.Text()})}
    captions = [{"id": i, "text": text} for i, text in enumerate(("ein Café", "b", "c", "d", "e", "f"))]
    source = opened(tmp_path, "mscoco_captions", features, [{"image": image(), "captions": captions}])
    assert source.kind == "retrieval" and source.classnames == source.templates == ()
    assert source[0].captions == ("ein Café", "b", "c", "d", "e", "f") and source[0].label == -1


def test_errors_name_what_is_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"^gtsrb: not in TensorFlow Datasets; use its webdataset export$"):
        TfdsRow(DATASETS["gtsrb"], tmp_path, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"classnames\.txt: no such file; TFDS provides only the images, the web"
    ):
        TfdsRow(DATASETS["mnist"], tmp_path, tmp_path)
    (tmp_path / "classnames.txt").write_text("one\ntwo")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("{c}")
    with pytest.raises(ValueError, match=r"classnames\.txt: 2 names, but mnist has 10 classes$"):
        TfdsRow(DATASETS["mnist"], tmp_path, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^tfds:coco_captions/2014: not prepared in .*prepare it with `tfds bu"
    ):
        TfdsRow(DATASETS["mscoco_captions"], tmp_path, tmp_path)


def test_a_suite_reads_tfds_if_the_export_has_no_images(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, exports: Any, hub: Any
) -> None:
    name = "vtab/smallnorb_label_azimuth"
    folder = tmp_path / DATASETS[name].folder
    features = {"image": F.Image(shape=(6, 6, 1)), "label_azimuth": F.ClassLabel(num_classes=18)}
    examples = [{"image": io.BytesIO(png(GREY + i)), "label_azimuth": i % 18} for i in range(20)]
    prepare(tmp_path / "tfds", DATASETS[name], features, examples)
    exports.write(folder, [0], [f"at {20 * i}" for i in range(18)], shards=1)
    (exported,) = suite_tasks(tmp_path, name, tfds=tmp_path / "tfds")
    assert len(exported.open()[1]) == 1
    (folder / "test" / "nshards.txt").unlink()
    (task,) = suite_tasks(tmp_path, name, tfds=tmp_path / "tfds")
    report = evaluate(exports.Direct(), [task], model="m")
    assert report.results[name].samples == 10 and not report.errors
    assert f"{name}: the images of TFDS may differ from those of the webdataset export" in caplog.messages
    (refused,) = suite_tasks(tmp_path, name)
    with pytest.raises(FileNotFoundError):
        refused.open()

    # The download fetches only names and templates, no images.
    exports.write(hub.root / folder.name, [0], [f"at {20 * i}" for i in range(18)], shards=1)
    (folder / "classnames.txt").unlink()
    for _ in range(2):
        (task,) = suite_tasks(tmp_path, name, download=True, tfds=tmp_path / "tfds")
        assert len(task.open()[1]) == 10
    assert [path.name for path in (folder / "test").iterdir()] == ["0.tar"]
