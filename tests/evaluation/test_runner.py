"""Evaluation of suites: the files, reuse of results, and failures."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import sys
import types
from typing import Any

import numpy as np
import pytest

from tclip_jax.evaluation import runner, suite
from tclip_jax.evaluation.page import report_table
from tclip_jax.evaluation.results import Result, read_predictions, read_result, write_result
from tclip_jax.evaluation.runner import Report, evaluate
from tclip_jax.evaluation.tasks import opened, source_task, suite_tasks

NAMES = "vtab/cifar10,vtab/pets,renderedsst2,voc2007_multilabel,flickr8k"
IMAGES = 24


@pytest.fixture(autouse=True)
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the expected number of images of all data sets to that of the exports of these tests."""
    for name, row in suite.DATASETS.items():
        monkeypatch.setitem(suite.DATASETS, name, dataclasses.replace(row, samples=IMAGES))


@pytest.fixture
def root(exports: types.SimpleNamespace, tmp_path: pathlib.Path) -> pathlib.Path:
    for row in suite.find_datasets(NAMES):
        targets: dict[str, list[Any]] = {
            "classification": [i % row.classes for i in range(IMAGES)] if row.classes else [],
            "multilabel": [(np.arange(row.classes) % 7 == i % 7).astype(int) for i in range(IMAGES)],
            "retrieval": [[f"a {i}", f"b {i}"] for i in range(IMAGES)],
        }
        exports.write(tmp_path / "data" / row.folder, targets[row.kind], [f"c{i}" for i in range(row.classes)])
    return tmp_path / "data"


def test_results_of_all_kinds(exports: types.SimpleNamespace, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = evaluate(exports.Direct(), suite_tasks(root, NAMES), model="a model", weights="0123", out=tmp_path / "out")
    assert report.errors == {} and report.partial == {} and [*report.results] == NAMES.split(",")
    for name, result in report.results.items():
        stored = read_result(tmp_path / "out" / f"{name.replace('/', '-')}.json")
        assert dataclasses.replace(stored, metrics={}) == dataclasses.replace(result, metrics={})
        assert stored.metrics == pytest.approx(result.metrics, nan_ok=True, abs=0)
        assert (stored.dataset, stored.model, stored.pretrained, stored.language) == (name, "a model", "0123", "en")
        assert stored.samples == IMAGES and stored.seconds > 0 and stored.dtype == "float32"
        assert {"jax", "tclip-jax", "numpy", "device", "devices"} <= set(stored.versions)
        arrays = read_predictions(tmp_path / "out", name)
        assert arrays["keys"].dtype.kind == "U" and len(set(arrays["keys"])) == IMAGES
    arrays = read_predictions(tmp_path / "out", "vtab/cifar10")
    assert arrays["top"].shape == (IMAGES, 5)
    assert np.mean(arrays["top"][:, 0] == arrays["labels"]) == report.results["vtab/cifar10"].metrics["acc1"]
    assert read_predictions(tmp_path / "out", "renderedsst2")["top"].shape == (IMAGES, 2)
    assert read_predictions(tmp_path / "out", "voc2007_multilabel")["scores"].shape == (IMAGES, 20)
    assert read_predictions(tmp_path / "out", "flickr8k")["image_rank"].shape == (2 * IMAGES,)

    # JSON has no NaN.
    text = (tmp_path / "out" / "renderedsst2.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["acc5"] is None
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    accuracies = [report.results[name].metrics for name in NAMES.split(",")[:3]]
    assert summary["metrics"]["acc1"] == pytest.approx(np.mean([each["acc1"] for each in accuracies]))
    pets = accuracies[1]["mean_per_class_recall"] - accuracies[1]["acc1"]
    assert summary["metrics"]["acc1_or_mean_per_class_recall"] == pytest.approx(summary["metrics"]["acc1"] + pets / 3)
    assert summary["failed"] == summary["partial"] == {} and set(summary["datasets"]) == set(NAMES.split(","))


def test_existing_results_are_not_evaluated_again(
    exports: types.SimpleNamespace, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    whole = evaluate(exports.Direct(), suite_tasks(root, NAMES), model="m", weights="w", out=tmp_path / "whole")

    class Stopped(exports.Direct):  # type: ignore[misc, name-defined]
        def texts(self, texts: Any) -> Any:
            if "a photo of a c17." in texts and "a photo of a c30." not in texts:  # voc2007_multilabel
                raise KeyboardInterrupt
            return super().texts(texts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(Stopped(), suite_tasks(root, NAMES), model="m", weights="w", out=out)
    assert sorted(path.name for path in out.glob("*.json")) == [
        "renderedsst2.json",
        "vtab-cifar10.json",
        "vtab-pets.json",
    ]
    # A crash between the two files leaves predictions without a result, which are evaluated again.
    (out / "flickr8k.predictions.npz").write_bytes(b"half")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    model = exports.Direct()
    report = evaluate(model, suite_tasks(root, NAMES), model="m", weights="w", out=out)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.json") if path.name in before} == before
    assert "a photo of a c36." not in model.encoded, "pets is not encoded again"
    for name in NAMES.split(","):
        assert report.results[name].metrics == pytest.approx(whole.results[name].metrics, nan_ok=True, abs=0)
        for key, array in read_predictions(tmp_path / "whole", name).items():
            np.testing.assert_array_equal(read_predictions(out, name)[key], array)

    (out / "renderedsst2.json").write_text('{"dataset": "renderedsst2"')
    with pytest.raises(ValueError, match=r"renderedsst2\.json: not JSON"):
        evaluate(exports.Direct(), suite_tasks(root, NAMES), model="m", weights="w", out=out)


def test_a_result_is_reused_only_if_the_same_inputs_made_it(
    exports: types.SimpleNamespace, root: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    export, out = root / "wds_renderedsst2", tmp_path / "out"
    (root / "wds_renderedsst2" / "test").rename(export / "val")
    task, spec, name = source_task(f"wds:{export}", "val"), f"wds:{export}", "wds_renderedsst2"
    first = evaluate(exports.Direct(), [task], model="m", weights="w", out=out).results[name]
    model = exports.Direct()
    again = evaluate(model, [task], model="m", weights="w", out=out).results[name]
    assert model.encoded == [] and again.metrics == pytest.approx(first.metrics, nan_ok=True, abs=0)
    assert read_result(out / "wds_renderedsst2.json").made_by == first.made_by == again.made_by

    def refused(message: str, task: Any = task, weights: str = "w", dtype: str = "float32") -> None:
        other = exports.Direct()
        other.dtype = dtype
        with pytest.raises(ValueError, match=rf"wds_renderedsst2\.json: {message}.*; choose another folder$"):
            evaluate(other, [task], model="m", weights=weights, out=out)
        assert other.encoded == []

    refused(r"made with different inputs \(model\.weights: 'w', not 'v'\)", weights="v")
    refused(r"made with different inputs \(model\.dtype: 'float32', not 'bfloat16'\)", dtype="bfloat16")
    refused(
        r"made with different inputs \(task\.templates: \['a photo of a \{c\}\.'.*, not \['\{c\}'\]\)",
        source_task(spec, "val", "none"),
    )
    exports.write(export, [1 - i % 2 for i in range(IMAGES)], ["c0", "c1"])
    refused(r"made with different inputs \(.*data\.split: 'val', not 'test'\)", source_task(spec, "test"))
    exports.write(root / "other", [i % 2 for i in range(IMAGES)], ["c0", "c1"], images={7: exports.picture(99)})
    (export / "val").rename(export / "old")
    (root / "other" / "test").rename(export / "val")
    refused(r"made with different inputs \(data\.content: '24:\w+', not '24:\w+'\)")
    (export / "val").rename(export / "swapped")
    (export / "old").rename(export / "val")
    (export / "classnames.txt").write_text("c1\nc0\n")
    refused(r"made with different inputs \(.*data\.classes: \['c0', 'c1'\], not \['c1', 'c0'\].*\)")
    path = out / "wds_renderedsst2.json"
    old = json.loads(path.read_text())
    del old["made_by"]
    path.write_text(json.dumps(old))
    refused("it does not record what made it")


def test_processes_with_different_data_are_refused(
    exports: types.SimpleNamespace, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "allgather_json", lambda value: [value, [value[0], "12:ab"]])
    report = evaluate(exports.Direct(), suite_tasks(root, "renderedsst2"), model="m")
    assert not report.results
    assert re.fullmatch(
        r"process 1 reads different data than process 0 \(12:ab, not 24:.*\)", report.errors["renderedsst2"]
    )


def test_predictions_of_another_result_are_refused(tmp_path: pathlib.Path) -> None:
    for folder, weights in (("a", "v"), ("b", "w")):
        (tmp_path / folder).mkdir()
        made_by = {"model": {"weights": weights}}
        result = Result("x", "m", weights, "t", {"acc1": 0.5}, made_by=made_by)
        write_result(tmp_path / folder, result, {"keys": np.array(["0"])})
        assert [*read_predictions(tmp_path / folder, "x", made_by)] == ["keys"]
    (tmp_path / "a" / "x.predictions.npz").rename(tmp_path / "b" / "x.predictions.npz")
    with pytest.raises(ValueError, match=r"x\.predictions\.npz: these predictions do not belong to the result"):
        read_predictions(tmp_path / "b", "x", read_result(tmp_path / "b" / "x.json").made_by)


def test_templates_come_from_the_arguments_then_the_data_then_the_default(
    exports: types.SimpleNamespace, root: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    export = f"wds:{root}/wds_renderedsst2"
    for spec, templates, first, message in (
        (export, "", "a photo of a c0.", "3 templates (from the data): 'a photo of a {c}.', '{c}', "),
        (export, "none", "c0", "1 templates (from the arguments): '{c}'"),
        ("digits", "", "a handwritten digit zero.", "7 templates (from the data)"),
        (f"folder:{root}/classes", "", "a photo of a cat.", "1 templates (default): 'a photo of a {c}.'"),
    ):
        (root / "classes" / "cat").mkdir(parents=True, exist_ok=True)
        (root / "classes" / "cat" / "0.png").write_bytes(exports.picture(0))
        model = exports.Direct()
        assert not evaluate(model, [source_task(spec, "test", templates)], model="m").errors
        assert model.encoded[0] == first and message in caplog.messages[-1]
    (root / "wds_renderedsst2" / "zeroshot_classification_templates.txt").unlink()
    (error,) = evaluate(exports.Direct(), [source_task(export)], model="m").errors.values()
    assert error.endswith(
        "zeroshot_classification_templates.txt: no such file; a webdataset export of CLIP_benchmark has one"
    )
    (error,) = evaluate(
        exports.Direct(), [source_task(f"wds:{root}/wds_flickr8k", "test", "none")], model="m"
    ).errors.values()
    assert error.endswith("wds_flickr8k: has captions, and templates apply only to class names")


def test_a_failure_does_not_stop_the_others(
    exports: types.SimpleNamespace, root: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [
        "mnist",
        "vtab/cifar10",
        "vtab/pets",
        "renderedsst2",
        "voc2007_multilabel",
        "flickr8k",
        "stl10",
        "flickr30k",
    ]
    (root / "wds_vtab-cifar10" / "classnames.txt").write_text("a\nb\n")
    exports.write(root / "wds_vtab-pets", [0, 1, 2, 37, 3], [f"c{i}" for i in range(37)], images={1: b"no image"})
    (root / "wds_renderedsst2" / "zeroshot_classification_templates.txt").write_text("a photo.\n")
    (root / "wds_voc2007_multilabel" / "dataset_type.txt").unlink()
    shard = root / "wds_flickr8k" / "test" / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    exports.write(root / "wds_stl10", [0] * (IMAGES + 1), [f"c{i}" for i in range(10)])
    exports.write(root / "wds_flickr30k", [[""]] * IMAGES)
    report = evaluate(exports.Direct(), suite_tasks(root, ",".join(names)), model="m", out=tmp_path / "out")
    assert report.errors == {
        "mnist": f"{root}/wds_mnist: no such folder; expected tars, or a folder of tars",
        "vtab/cifar10": f"{root}/wds_vtab-cifar10/classnames.txt: 2 names, but vtab/cifar10 has 10 classes",
        "renderedsst2": f"{root}/wds_renderedsst2/zeroshot_classification_templates.txt: "
        "template 'a photo.' has no {c} for the class name",
        "voc2007_multilabel": f"{root}/wds_voc2007_multilabel: the kind is classification by dataset_type.txt, "
        "but voc2007_multilabel is multilabel",
        "flickr8k": f"{root}/wds_flickr8k/test/1.tar: not a complete tar file: "
        "'s0000013.png' does not lie within the file",
        "flickr30k": f"no usable image: {IMAGES} x no caption",
    }
    assert report.partial == {
        "vtab/pets": {"unreadable image": 1, "label missing or out of range": 1, "missing from the export": 19},
        "stl10": {"more than the reference has": 1},
    }
    assert report.results["vtab/pets"].samples == 3 and [*report.results] == ["vtab/pets", "stl10"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] == report.errors and summary["partial"] == report.partial
    assert not (tmp_path / "out" / "mnist.json").exists() and "mnist: no result: " in caplog.text
    table = report_table(report)
    assert "PARTIAL  vtab/pets: 1 x unreadable image, 1 x label missing or out of range, 19 x missing" in table
    assert f"FAILED   flickr30k: no usable image: {IMAGES} x no caption" in table


def test_single_sources(exports: types.SimpleNamespace, root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name, metric in (
        ("vtab-cifar10", "acc1"),
        ("voc2007_multilabel", "mean_average_precision"),
        ("flickr8k", "image_retrieval_recall@5"),
    ):
        source = f"wds:{root}/wds_{name}"
        report = evaluate(exports.Direct(), [source_task(source)], model="m", out=tmp_path / "out")
        result = report.results[f"wds_{name}"]
        assert metric in result.metrics and result.source == source and report.partial == {}
        assert (tmp_path / "out" / f"wds_{name}.json").exists()
    (again,) = opened([source_task("digits", "test", ("{c}",))])
    assert again.open() is again.open() and len(again.open()[1]) == 397
    with pytest.raises(ValueError, match="unknown data source 'imagenet'"):
        opened([source_task("imagenet", "test", "simple")])
    with pytest.raises(ValueError, match="the table of suites and data sets has no 'imagenet2k'"):
        suite_tasks(root, "imagenet2k")


def test_download_fetches_missing_exports(exports: types.SimpleNamespace, root: pathlib.Path, hub: Any) -> None:
    exports.write(hub.root / "wds_stl10", [i % 10 for i in range(IMAGES)], [f"c{i}" for i in range(10)])
    tasks = suite_tasks(root, "stl10,mnist,vtab/cifar10", download=True)
    hub.stop_at = "test/1.tar"
    stopped = evaluate(exports.Direct(), tasks[:1], model="m")
    assert stopped.errors == {"stl10": "clip-benchmark/wds_stl10: download failed: Connection reset"}
    hub.stop_at = ""
    report = evaluate(exports.Direct(), tasks, model="m")
    assert hub.requested == ["clip-benchmark/wds_stl10", "clip-benchmark/wds_mnist"]
    assert report.errors == {"mnist": "clip-benchmark/wds_mnist: download failed: Repository not found"}
    assert set(report.results) == {"stl10", "vtab/cifar10"}


def test_the_progress_bar_counts_every_image(
    exports: types.SimpleNamespace, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Bar:
        def __init__(self, total: int, **options: Any) -> None:
            self.total, self.n, self.disable = total, 0, options["disable"]
            bars.append(self)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None: ...

        def set_description(self, text: str) -> None: ...

        def refresh(self) -> None: ...

        def update(self, images: int) -> None:
            self.n += images

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    exports.write(root / "wds_stl10", [0] * 5, [f"c{i}" for i in range(10)])
    evaluate(exports.Direct(7), suite_tasks(root, f"{NAMES},stl10,mnist"), model="m")
    assert (bars[0].n, bars[0].total, bars[0].disable) == (5 * IMAGES + 5, 5 * IMAGES + 5, False)


def test_table_and_averages() -> None:
    metrics = {"acc1": 0.5, "acc5": math.nan, "mean_per_class_recall": 0.25}
    results = {
        name: Result(name, "m", "", "zeroshot_classification", metrics, samples=12345, failed=failed)
        for name, failed in (("vtab/pets", {}), ("mnist", {"unreadable image": 1234}))
    }
    report = Report(results, {"stl10": "no such folder"})
    assert report.averages == {"acc1": 0.5, "acc1_or_mean_per_class_recall": 0.375}
    assert report_table(report).splitlines() == [
        "data set   images   acc1  acc5  per class",
        "vtab/pets  12,345  50.00     –      25.00",
        "mnist      12,345  50.00     –      25.00",
        "",
        "mean of acc1 over 2 sets (CLIP_benchmark): 50.00%",
        "mean over 2 sets, per class for caltech101, fgvc_aircraft, flowers and pets (OpenAI, DataComp): 37.50%",
        "PARTIAL  mnist: 1,234 x unreadable image",
        "FAILED   stl10: no such folder",
    ]
    assert Report({}, {}).averages == {} and report_table(Report({}, {"a": "b"})) == "FAILED   a: b"


@pytest.mark.torch
# CLIP_benchmark leaves files open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_clip_benchmark_reads_our_results_and_we_read_its_results(tmp_path: pathlib.Path) -> None:
    import csv

    from clip_benchmark import cli

    metrics = {"acc1": 0.5, "acc5": math.nan, "mean_per_class_recall": 0.25}
    write_result(tmp_path, Result("vtab/pets", "model", "w", "zeroshot_classification", metrics), {})
    summary = Report({"vtab/pets": read_result(tmp_path / "vtab-pets.json")}, {}).summary("model", "w", "float32")
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    fields = {
        "dataset": "wds/x",
        "model": "ViT",
        "pretrained": "p",
        "task": "zeroshot_classification",
        "language": "en",
    }
    (tmp_path / "x.json").write_text(json.dumps(fields | {"metrics": metrics, "classnames": ["a"]}))
    cli.main_build(types.SimpleNamespace(files=[str(tmp_path)], output=str(tmp_path / "table.csv")))
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"vtab/pets", "average", "wds/x"}
    assert rows["vtab/pets"]["acc1"] == "0.5" and rows["vtab/pets"]["model_fullname"] == "model w"
    assert (rows["vtab/pets"]["acc5"], rows["wds/x"]["acc5"]) == ("", "nan")
    assert rows["average"]["acc1"] == "0.5"
    assert math.isnan(read_result(tmp_path / "x.json").metrics["acc5"])
