"""The table of the 41 data sets against CLIP_benchmark."""

from __future__ import annotations

import pytest

from tclip_jax.evaluation.suite import DATASETS, SUITES, find_datasets


def test_suites_have_the_right_size() -> None:
    kinds = [row.kind for row in DATASETS.values()]
    assert [kinds.count(kind) for kind in ("classification", "multilabel", "retrieval")] == [37, 1, 3]
    assert {name: len(suite) for name, suite in SUITES.items()} == {
        "clip-benchmark-41": 41,
        "imagenet": 7,
        "vtab": 19,
        "retrieval": 3,
    }
    assert {row.name for row in DATASETS.values() if 0 < row.classes < 5} == {
        "renderedsst2",
        "vtab/pcam",
        "vtab/kitti_closest_vehicle_distance",
    }


@pytest.mark.torch
def test_names_and_suites_equal_clip_benchmark() -> None:
    from clip_benchmark.datasets.builder import dataset_collection

    assert set(SUITES["vtab"]) == set(dataset_collection["vtab"])
    assert set(SUITES["retrieval"]) == set(dataset_collection["retrieval"])
    theirs = {*dataset_collection["vtab+"], *dataset_collection["retrieval"]}
    # These two exports are in no collection.
    assert set(DATASETS) - theirs == {"imagenet-o", "vtab/dsprites_label_y_position"} and theirs <= set(DATASETS)
    assert set(SUITES["imagenet"]) == {"imagenet1k", "imagenet-o", *dataset_collection["imagenet_robustness"]}


@pytest.mark.torch
def test_numbers_of_classes_equal_clip_benchmark() -> None:
    import importlib.resources
    import json

    names = json.loads((importlib.resources.files("clip_benchmark") / "datasets" / "en_classnames.json").read_text())
    known = {**names, "caltech101": names["caltech101_vtab"]}
    checked = [row for row in DATASETS.values() if row.name.removeprefix("vtab/") in known]
    assert [len(known[row.name.removeprefix("vtab/")]) for row in checked] == [row.classes for row in checked]
    assert len(checked) == 16


def test_names_of_files_and_folders() -> None:
    row = DATASETS["vtab/cifar10"]
    assert (row.stem, row.folder, row.task) == ("vtab-cifar10", "wds_vtab-cifar10", "zeroshot_classification")
    assert DATASETS["voc2007_multilabel"].task == "zeroshot_classification"
    assert DATASETS["flickr8k"].task == "zeroshot_retrieval"
    averaged = [row.name for row in DATASETS.values() if row.averaged == "mean_per_class_recall"]
    assert averaged == ["fgvc_aircraft", "vtab/caltech101", "vtab/flowers", "vtab/pets"]


def test_lists_of_names_and_suites() -> None:
    assert [row.name for row in find_datasets("flickr30k, mnist,retrieval")] == [
        "flickr30k",
        "mnist",
        "mscoco_captions",
        "flickr8k",
    ]
    with pytest.raises(ValueError, match=r"^the table of suites and data sets has no 'cifar10': the nearest is 'vtab/"):
        find_datasets("mnist,cifar10")
