"""Comparisons of two folders of results: numbers, refusals, and every form of the report."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.evaluation import comparison
from tclip_jax.evaluation.comparison import compare_results
from tclip_jax.evaluation.comparison_report import plot_deltas, to_html, to_text
from tclip_jax.evaluation.metrics import mean_average_precision
from tclip_jax.evaluation.paired import Predicted
from tclip_jax.evaluation.results import Result, read_predictions, read_result, write_result
from tclip_jax.evaluation.retrieval import retrieval_ranks, retrieval_recall
from tests.pages import Page

N, CLASSES = 400, 10
KS = (1, 5)


def write(folder: pathlib.Path, dataset: str, metrics: dict[str, Any], predictions: Any, task: str = "") -> None:
    folder.mkdir(exist_ok=True)
    task = task or "zeroshot_classification"
    write_result(folder, Result(dataset, folder.name, "abc", task, metrics, samples=N), predictions)


def classified(folder: pathlib.Path, dataset: str, accuracy: float, seed: int = 0, rows: Any = slice(None)) -> None:
    """Write predictions with the same labels for every seed, and the images in an order that depends on the seed."""
    labels = np.random.default_rng(9).integers(0, CLASSES, N).astype(np.int32)
    rng = np.random.default_rng(seed)
    top = np.stack([rng.permutation(CLASSES)[:5] for _ in range(N)]).astype(np.int32)
    right = rng.random(N) < accuracy
    top[right, 0] = labels[right]
    order = rng.permutation(np.arange(N)[rows])
    predictions = {
        "keys": np.array([f"s{i:04d}" for i in order]),
        "index": order,
        "labels": labels[order],
        "top": top[order],
    }
    predicted = Predicted(predictions["keys"], {"labels": labels[order], "top": top[order]})
    metrics = {name: predicted.value(name) for name in ("acc1", "acc5", "mean_per_class_recall")}
    write(folder, dataset, metrics, predictions)


def retrieved(folder: pathlib.Path, noise: float, images: int = 60) -> None:
    rng = np.random.default_rng(5)
    owners = rng.permutation(np.repeat(np.arange(images), rng.integers(1, 7, images)))
    image = rng.normal(size=(images, 8))
    text = image[owners] + noise * rng.normal(size=(len(owners), 8))
    ranks = retrieval_ranks(image, text, owners)
    predictions = {
        "keys": np.array([f"i{i}" for i in range(images)]),
        "index": np.arange(images),
        "text_rank": ranks.text,
        "text_to_image": owners,
        "image_rank": ranks.image,
    }
    write(folder, "flickr8k", retrieval_recall(image, text, owners, KS), predictions, "zeroshot_retrieval")


def labelled(folder: pathlib.Path, noise: float) -> None:
    rng = np.random.default_rng(6)
    labels = (rng.random((N, CLASSES)) < 0.2).astype(np.int32)
    scores = (labels + noise * rng.normal(size=labels.shape)).astype(np.float32)
    predictions = {"keys": np.array([f"v{i}" for i in range(N)]), "index": np.arange(N)}
    metrics = {"mean_average_precision": mean_average_precision(scores, labels)}
    write(folder, "voc2007_multilabel", metrics, predictions | {"labels": labels, "scores": scores})


@pytest.fixture
def folders(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Results `a` and `b`: b is better on mnist, equal on cars, and worse on the rest."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, accuracy, noise, seed in ((a, 0.5, 0.8, 1), (b, 0.8, 1.2, 2)):
        classified(folder, "mnist", accuracy, seed)
        classified(folder, "cars", 0.6, seed=3)
        retrieved(folder, noise)
        labelled(folder, noise)
    return a, b


def binomial(lost: int, gained: int) -> float:
    """Return twice the binomial tail of the smaller count, at most 1, in integer arithmetic."""
    changed = lost + gained
    return min(1.0, 2 * sum(math.comb(changed, i) for i in range(min(lost, gained) + 1)) / 2**changed)


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (0, 1), (3, 9), (9, 3), (5, 5), (5, 6), (120, 60), (1500, 1400), (0, 1000)]
)
def test_p_is_mcnemars_exact_one(lost: int, gained: int) -> None:
    changes = np.repeat([-1, 0, 1], [lost, 50, gained])
    assert comparison._mcnemar(changes < 0, changes > 0) == pytest.approx(binomial(lost, gained), rel=1e-9)


def test_numbers(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    compared = compare_results(*folders, resamples=500)
    rows = {row.dataset: row for row in compared.rows}
    assert list(rows) == ["cars", "flickr8k", "mnist", "voc2007_multilabel"] and not compared.refused

    sides = [read_predictions(folder, "mnist") for folder in folders]
    right = [dict(zip(side["keys"], side["top"][:, 0] == side["labels"], strict=True)) for side in sides]
    mnist = rows["mnist"]
    assert set(mnist.flips.lost) == {key for key in right[0] if right[0][key] and not right[1][key]}
    assert set(mnist.flips.gained) == {key for key in right[0] if right[1][key] and not right[0][key]}
    p = binomial(len(mnist.flips.lost), len(mnist.flips.gained))
    assert mnist.flips.p == pytest.approx(p, rel=1e-9) and p < 0.01
    acc1 = mnist.deltas["acc1"]
    assert acc1.delta == pytest.approx((len(mnist.flips.gained) - len(mnist.flips.lost)) / N, abs=1e-12)
    assert 0 < acc1.low < acc1.delta < acc1.high and acc1.clear
    assert set(mnist.deltas) == {"acc1", "acc5", "mean_per_class_recall"}
    assert all(each.low <= each.delta <= each.high for each in mnist.deltas.values())

    same = rows["cars"]
    assert same.deltas["acc1"].delta == same.deltas["acc1"].low == same.deltas["acc1"].high == 0
    assert same.flips.lost == same.flips.gained == () and same.flips.p == 1

    recalls = rows["flickr8k"]
    assert recalls.metric == "image_retrieval_recall@5" and recalls.images == 60
    assert set(recalls.deltas) == {f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in KS}
    assert recalls.deltas["image_retrieval_recall@5"].high < 0
    assert rows["voc2007_multilabel"].flips is None
    assert rows["voc2007_multilabel"].deltas["mean_average_precision"].high < 0

    main_deltas = [row.deltas[row.metric].delta for row in compared.rows]
    assert compared.mean.delta == pytest.approx(np.mean(main_deltas)) and compared.mean.low < compared.mean.delta
    assert compare_results(*folders, resamples=500) == compared != compare_results(*folders, resamples=500, seed=1)


def test_different_images_are_refused_or_intersected(
    folders: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = folders
    classified(b, "mnist", 0.8, seed=2, rows=slice(30, None))
    arguments = ["evaluate", "compare", str(a), str(b), "--resamples", "200"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert (
        "not compared: mnist: 30 images only in A, 0 only in B; --intersect compares the 370 common images\n" in shown
    )
    assert main([*arguments, "--intersect"]) == 0
    assert "mnist: compared on 370 images; left out 30 only in A, 0 only in B\n" in capsys.readouterr().out
    row = next(row for row in compare_results(a, b, intersect=True, resamples=100).rows if row.dataset == "mnist")
    side = read_predictions(a, "mnist")
    common = side["index"] >= 30
    assert row.deltas["acc1"].a == np.mean((side["top"][:, 0] == side["labels"])[common])


def test_metrics_without_predictions_are_not_compared_on_common_images(tmp_path: pathlib.Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, images in ((a, N), (b, N - 30)):
        share = np.random.default_rng(images).integers(0, 6, images) / 5
        predictions = {"keys": np.array([f"s{i:04d}" for i in range(images)]), "index": np.arange(images)}
        predictions |= {"labels": np.arange(images) % CLASSES, "share": share}
        write(folder, "mnist", {"acc1": share.mean(), "acc5": 0.9}, predictions, "4_shot")
    (row,) = compare_results(a, b, intersect=True, resamples=100).rows
    assert row.images == N - 30 and set(row.deltas) == {"acc1"}
    for folder in (a, b):
        predictions = read_predictions(folder, "mnist")
        write(folder, "mnist", {"acc5": 0.9}, predictions, "4_shot")
    refused = {"mnist": "acc5 cannot be computed on the common images"}
    assert compare_results(a, b, intersect=True, resamples=100).refused == refused


def test_two_results_of_one_data_set_are_refused(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    (folders[1] / "mnist_other_model.json").write_text((folders[1] / "mnist.json").read_text())
    with pytest.raises(
        ValueError, match=r"mnist_other_model\.json: a second result of mnist; a folder must hold those of one model$"
    ):
        compare_results(*folders, resamples=100)


def predictions_of(folder: pathlib.Path, dataset: str, **changes: Any) -> None:
    np.savez(folder / f"{dataset}.predictions.npz", **(read_predictions(folder, dataset) | changes))


@pytest.mark.parametrize(
    ("dataset", "change", "reason"),
    [
        ("mnist", lambda p: {"keys": p["keys"][:-1]}, "labels is int32 (400,), but there are 399 keys"),
        ("mnist", lambda p: {"keys": np.repeat(p["keys"][:1], N)}, "keys must be unique strings, one per image"),
        ("mnist", lambda p: {"keys": np.arange(N)}, "keys must be unique strings, one per image"),
        ("mnist", lambda p: {"top": p["top"][:, 0]}, "top is int32 (400,), but there are 400 keys"),
        ("mnist", lambda p: {"top": np.zeros_like(p["top"])}, "by its predictions"),
        (
            "mnist",
            lambda p: {n: (p[n] + 1) % 10 for n in ("labels", "top")},
            "400 images have different labels in A and B",
        ),
        (
            "flickr8k",
            lambda p: {"keys": np.char.add("x", p["keys"])},
            "60 images only in A, 60 only in B; retrieval ranks all",
        ),
        ("flickr8k", lambda p: {"text_to_image": p["text_to_image"] + 60}, "not the predictions of an evaluation"),
        ("flickr8k", lambda p: {"text_to_image": p["text_to_image"] / 2}, "not the predictions of an evaluation"),
        ("voc2007_multilabel", lambda p: {"scores": p["scores"][:, :3]}, "scores are (400, 3), labels (400, 10)"),
    ],
)
def test_predictions_that_cannot_be_compared_are_refused(
    folders: tuple[pathlib.Path, pathlib.Path], dataset: str, change: Any, reason: str
) -> None:
    a, b = folders
    predictions_of(b, dataset, **change(read_predictions(b, dataset)))
    compared = compare_results(a, b, intersect=True, resamples=100)
    assert list(compared.refused) == [dataset] and reason in compared.refused[dataset]
    assert len(compared.rows) == 3


def test_a_pickle_is_not_loaded(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    predictions_of(folders[1], "mnist", keys=np.array([{"a": 1}] * N, object))
    assert "Object arrays cannot be loaded" in compare_results(*folders, resamples=100).refused["mnist"]


def test_a_data_set_in_one_folder_and_a_different_task_are_refused(
    folders: tuple[pathlib.Path, pathlib.Path],
) -> None:
    a, b = folders
    (b / "cars.json").unlink()
    saved = json.loads((b / "mnist.json").read_text())
    (b / "mnist.json").write_text(json.dumps(saved | {"task": "linear_probe"}))
    assert compare_results(a, b, resamples=100).refused == {
        "cars": f"only in {a}",
        "mnist": "the task is zeroshot_classification in A and linear_probe in B",
    }


def test_results_of_clip_benchmark_have_differences_without_intervals(
    folders: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    fields = {"dataset": "mnist", "model": "ViT-B-32", "pretrained": "openai", "task": "zeroshot_classification"}
    fields |= {"metrics": {"acc1": 0.25, "acc5": float("nan"), "mean_per_class_recall": 0.5}, "language": "en"}
    (folder / "mnist.json").write_text(json.dumps(fields))
    assert main(["evaluate", "compare", str(folders[0]), str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "no predictions, so no intervals: mnist" in shown and "ViT-B-32 (openai)" in shown
    assert main(["evaluate", "compare", str(folder), str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"][0]["deltas"]["acc5"] == {"a": None, "b": None, "low": None, "high": None, "delta": None}


def test_results_of_different_data_or_templates_are_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_by = {
        "evaluation": 1,
        "model": {"weights": "v"},
        "data": {"split": "test", "content": "ab", "classes": ["x", "y"]},
        "task": {"kind": "classification", "templates": ["a {c}"]},
    }

    def written(folder: str, **changes: Any) -> str:
        for each in ("a", "b"):
            classified(tmp_path / each, "mnist", 0.5)
        result, made = read_result(tmp_path / "a" / "mnist.json"), made_by if folder == "a" else made_by | changes
        for side, by in (("a", made_by), (folder, made)):
            result = dataclasses.replace(read_result(tmp_path / side / "mnist.json"), made_by=by)
            write_result(tmp_path / side, result, read_predictions(tmp_path / side, "mnist"))
        return str(tmp_path / folder)

    for changes, message in (
        ({"task": {"kind": "classification", "templates": ["{c}"]}}, "task.templates: ['a {c}'], not ['{c}']"),
        ({"data": made_by["data"] | {"split": "train"}}, "data.split: 'test', not 'train'"),  # type: ignore[operator]
        ({"data": made_by["data"] | {"content": "cd"}}, "data.content: 'ab', not 'cd'"),  # type: ignore[operator]
        ({"data": made_by["data"] | {"classes": ["y", "x"]}}, "data.classes: ['x', 'y'], not ['y', 'x']"),  # type: ignore[operator]
        ({"evaluation": 2}, "evaluation: 1, not 2"),
    ):
        compared = compare_results(tmp_path / "a", written("b", **changes), resamples=100)
        assert compared.refused == {"mnist": f"A and B differ in more than the model: {message}"} and not compared.rows
    common = compare_results(tmp_path / "a", written("b", data=made_by["data"] | {"content": "cd"}), intersect=True)  # type: ignore[operator]
    assert common.rows[0].images == N, "--intersect allows different images"
    (row,) = compare_results(
        tmp_path / "a", written("b", model={"weights": "w", "dtype": "bfloat16"}), resamples=100
    ).rows
    assert row.checked and (row.split, row.content) == ("test", "ab")
    classified(tmp_path / "b", "mnist", 0.5)
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "a result does not record what made it, so data and templates may differ: mnist" in capsys.readouterr().out


def test_exit_code_of_a_drop(folders: tuple[pathlib.Path, pathlib.Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "compare", *map(str, folders), "--resamples", "100"]
    assert [main([*arguments, *extra]) for extra in ([], ["--max-drop", "1"], ["--max-drop", "90"])] == [0, 1, 0]
    assert main(["evaluate", "compare", str(folders[0]), str(folders[0] / "none")]) == 2
    assert capsys.readouterr().err.startswith("tclip evaluate compare: error: ")
    assert main([*arguments[:-1], "5"]) == 2


def test_table_is_aligned_and_marks_clear_differences(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    lines = to_text(compare_results(*folders, resamples=200)).splitlines()
    assert lines[0] == f"A: {folders[0]}: a (abc)"
    table = lines[3 : lines.index("", 3)]
    assert [line.split()[0] for line in table] == ["dataset", "cars", "flickr8k", "mnist", "voc2007_multilabel", "mean"]
    columns = {line.index(mark) for line in table[1:-1] for mark in ("better", " worse") if mark in line}
    assert len(columns) == 1
    assert lines[-1].startswith("B is clearly better on 1, clearly worse on 2;")


def test_the_page_is_escaped_and_loads_nothing(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    for folder in folders:
        keys = read_predictions(folder, "mnist")["keys"]
        predictions_of(folder, "mnist", keys=np.char.add("<b>", keys))
    page = Page(to_html(compare_results(*folders, resamples=200)))
    assert [picture.format for picture in page.pictures()] == ["PNG", "PNG"]
    assert "<b>s0000" in page.words or "<b>s0001" in page.words or "<b>s0002" in page.words


def test_plot_shows_every_difference_in_order(
    folders: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare_results(*folders, resamples=200)
    (axes,) = plot_deltas(compared).axes
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "oD"]
    expected = sorted(100 * row.deltas[row.metric].delta for row in compared.rows)
    np.testing.assert_allclose(dots, [*expected, 100 * compared.mean.delta])
    assert [label.get_text() for label in axes.get_yticklabels()][-2:] == ["mnist", "mean"]
    arguments = ["evaluate", "compare", *map(str, folders), "--resamples", "100"]
    assert main([*arguments, "--plot", str(tmp_path / "p.png"), "--html", str(tmp_path / "p.html")]) == 0
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"
    assert (tmp_path / "p.html").stat().st_size > 10_000


def test_one_data_set_has_no_mean_and_lies_within_the_frame(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    for folder in folders:
        for path in folder.glob("[!m]*"):
            path.unlink()
    compared = compare_results(*folders, resamples=200)
    text = to_text(compared)
    assert "\nmean" not in text and text.splitlines()[-2].startswith("mnist: ")
    assert text.splitlines()[-1].startswith("B is clearly better; about 1 of 20")
    (axes,) = plot_deltas(compared).axes
    (dot,) = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    low, high = axes.get_ylim()
    assert low + 0.5 <= dot.get_ydata()[0] <= high - 0.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mnist"]


def test_the_page_is_open_and_its_table_leads_to_the_images(folders: tuple[pathlib.Path, pathlib.Path]) -> None:
    page = Page(to_html(compare_results(*folders, resamples=200)))
    assert "All metrics" in page.words
    anchors = [attributes.get("id") for tag, attributes in page.tags if tag == "details" and "id" in attributes]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(anchors) == 3 and links == [f"#{anchor}" for anchor in anchors]
    sections = [attributes for tag, attributes in page.tags if tag == "details"]
    assert len(sections) == 3 and all("open" in attributes for attributes in sections)
    assert any(word.startswith("--data DIR, the folder of the exports, adds the images") for word in page.words)


def test_folders_of_probes_are_compared_probe_by_probe(tmp_path: pathlib.Path) -> None:
    for side, accuracy in (("a", 0.5), ("b", 0.8)):
        for probe in ("16_shot", "2_shot", "linear_probe", "elsewhere"):
            (tmp_path / side / probe).mkdir(parents=True)
            classified(tmp_path / side / probe, "mnist", accuracy)
    (tmp_path / "a" / "4_shot").mkdir()
    classified(tmp_path / "a" / "4_shot", "cars", 0.5)
    compared = compare_results(tmp_path / "a", tmp_path / "b", resamples=100)
    assert [(row.dataset, row.probe) for row in compared.rows] == [
        ("mnist", "linear_probe"),
        ("mnist", "2_shot"),
        ("mnist", "16_shot"),
    ]
    assert compared.refused == {"cars, 4 shot": f"only in {tmp_path}/a"}
    assert "mnist, 16 shot" in to_text(compared) and "mnist, linear probe" in Page(to_html(compared)).text
    classified(tmp_path / "a", "cars", 0.5)  # results of its own come first
    assert set(compare_results(tmp_path / "a", tmp_path / "b", resamples=100).refused) == {
        *("cars", "mnist, linear probe", "mnist, 2 shot", "mnist, 16 shot")
    }
    (tmp_path / "none").mkdir()
    with pytest.raises(
        ValueError, match=r"none: it has no results \(<dataset>\.json\), and no probes \(linear_probe/, "
    ):
        compare_results(tmp_path / "none", tmp_path / "b")
