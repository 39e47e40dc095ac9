"""The page of an evaluation: complete, escaped, self-contained, and with the mistakes of the model."""

from __future__ import annotations

import io
import pathlib
import re
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.data.sources import BadSample, Record
from tclip_jax.data.sources.webdataset import Webdataset
from tclip_jax.evaluation.comparison import compare_results
from tclip_jax.evaluation.comparison_report import flipped
from tclip_jax.evaluation.mistakes import changed, confusions, examples, weakest_classes
from tclip_jax.evaluation.page import cards, plot_metrics, to_html
from tclip_jax.evaluation.results import Result, read_predictions
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import source_task, suite_tasks
from tests.pages import Page

NAMES = ["<b>zero</b>", *(f"digit {i}" for i in range(1, 10))]


@pytest.fixture
def evaluated(tmp_path: pathlib.Path, exports: types.SimpleNamespace) -> Any:
    """The report, folder and tasks of three small exports, one with a broken image, and of a missing export."""
    root, out = tmp_path / "exports", tmp_path / "out"
    exports.write(root / "wds_mnist", [i % 10 for i in range(40)], NAMES, images={3: b"broken"})
    vectors = [np.eye(20, dtype=np.int64)[i % 20] for i in range(20)]
    exports.write(root / "wds_voc2007_multilabel", vectors, [f"thing {i}" for i in range(20)])
    exports.write(root / "wds_flickr8k", [[f"<b>caption</b> {i} {j}" for j in range(5)] for i in range(12)])
    tasks = suite_tasks(root, "mnist,voc2007_multilabel,flickr8k,cars")
    return evaluate(exports.Direct(), tasks, model="model & co", out=out), out, tasks


def test_the_page_shows_the_results_and_loads_nothing(evaluated: Any) -> None:
    report, out, tasks = evaluated
    text = to_html(report, out, tasks, limit=4)
    page = Page(text)
    assert "Evaluation of model & co" in page.words and "://" not in text
    assert {"mnist", "39", "<b>zero</b>"} <= set(page.words)
    assert any(word.startswith("PARTIAL  mnist: 1 x unreadable image, 9,960 x") for word in page.words)
    assert any(word.startswith("FAILED   cars: ") for word in page.words)
    assert any(word.startswith("<b>caption</b>") for word in page.words)
    kinds = [address.partition(",")[0] for address in page.addresses]
    assert set(kinds[:2]) == {"data:image/png;base64"} and set(kinds[2:]) == {"data:image/jpeg;base64"}
    assert 3 <= len(kinds[2:]) <= 12
    assert len(page.pictures()) == len(kinds)


def test_missing_or_changed_data_removes_only_the_examples(evaluated: Any, exports: types.SimpleNamespace) -> None:
    report, out, tasks = evaluated
    (out / "mnist.predictions.npz").unlink()
    exports.write(tasks[1].open()[1]._folder, [np.eye(20, dtype=np.int64)[0]], [str(i) for i in range(20)], shards=1)
    (tasks[2].open()[1]._folder / "test" / "nshards.txt").unlink()
    words = Page(to_html(report, out, tasks)).words
    assert sum(word.startswith("no examples: ") for word in words) == 3
    assert any(word.endswith(": the data has changed since the evaluation") for word in words)


def test_unreadable_data_removes_only_the_examples(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmounted(self: Webdataset, index: int) -> Record:
        raise OSError("Stale file handle")

    monkeypatch.setattr(Webdataset, "__getitem__", unmounted)
    words = Page(to_html(*evaluated)).words
    assert sum(word == "no examples: Stale file handle" for word in words) == 3 and "39" in words


def test_the_plot_shows_every_main_metric() -> None:
    results = [
        Result("a", "m", "w", "t", {"acc1": 0.25, "acc5": 0.5}),
        Result("b", "m", "w", "t", {"mean_average_precision": 0.75}),
        Result("c", "m", "w", "t", {"acc1": float("nan")}),
        Result("d", "m", "w", "linear_probe", {"mean_accuracy": 0.5}),
    ]
    (axes,) = plot_metrics(results).axes
    assert [bar.get_width() for bar in axes.patches] == [25, 50, 75]
    assert axes.get_xlabel() == "acc1, mAP, mean_accuracy in %"
    assert_within_the_frame(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "d", "b"]


@pytest.mark.parametrize("count", [1, 2, 41])
def test_bars_have_space_within_the_frame(count: int) -> None:
    results = [Result(f"set {i}", "m", "w", "t", {"acc1": (i + 1) / count}) for i in range(count)]
    figure = plot_metrics(results)
    assert_within_the_frame(figure.axes[0])
    assert figure.get_figheight() / (count + 4) < 0.4


def assert_within_the_frame(axes: Any) -> None:
    low, high = axes.get_ylim()
    edges = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches]
    assert min(bottom for bottom, _ in edges) - low == pytest.approx(high - max(top for _, top in edges))
    assert min(bottom for bottom, _ in edges) - low > 0.3


def test_mistakes_are_open_and_the_table_leads_to_them(evaluated: Any) -> None:
    page = Page(to_html(*evaluated))
    sections = [attributes for tag, attributes in page.tags if tag == "details"]
    assert len(sections) == 3 and all("open" in section for section in sections)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{section['id']}" for section in sections]
    assert "Model and machine" in page.words and "python" in page.words
    # The name of a sample is that of the predictions; its end is shown.
    names = [attributes["title"] for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    _, out, _ = evaluated
    assert set(names) <= {key for name in ("mnist", "flickr8k", "voc2007_multilabel") for key in keys(out, name)}
    assert f"…/{'/'.join(names[0].split('/')[-2:])}" in page.text


def keys(out: pathlib.Path, name: str) -> set[str]:
    return set(read_predictions(out, name)["keys"])


class Pictures:
    classnames = ("cat", "dog", "cow")

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if index == 4:
            raise BadSample("unreadable", "4", "the disk is gone")
        image: Any = b"no image" if index == 2 else np.full((300, 200, 3), 10 * index, np.uint8)
        return Record(image, ("a caption",), 0, str(index))


PREDICTIONS = {
    "keys": np.array(["0", "2", "3", "5", "7", "9"]),
    "index": np.array([0, 2, 3, 5, 7, 9]),
    "labels": np.array([0, 1, 1, 2, 0, 1]),
    "top": np.array([[0, 1], [0, 1], [2, 1], [2, 0], [1, 0], [2, 0]]),
}


def test_mistakes_are_read_by_their_index_in_the_source() -> None:
    shown = examples(PREDICTIONS, Pictures(10), 10)
    # The image of row 1 is unreadable.
    assert [(each.truth, *each.predicted) for each in shown] == [("dog", "cow"), ("cat", "dog"), ("dog", "cow")]
    shades = []
    for each in shown:
        with Image.open(io.BytesIO(each.thumbnail)) as picture:
            assert picture.width < picture.height and not each.small  # as the image of 200 by 300
            shades.append(round(np.asarray(picture).mean() / 10))
    assert shades == [3, 7, 9]
    assert len(examples(PREDICTIONS, Pictures(10), 1)) == 0 and len(examples(PREDICTIONS, Pictures(10), 2)) == 1
    lost = {"keys": np.array(["4", "5"]), "index": np.array([4, 5]), "labels": np.ones(2, int), "top": np.zeros((2, 1))}
    assert [each.truth for each in examples(lost, Pictures(10), 5)] == ["dog"]
    with pytest.raises(ValueError, match=r"^image 5 is 5, not 6$"):
        examples(lost | {"keys": np.array(["4", "6"])}, Pictures(10), 5)


def test_a_long_caption_ends_in_an_ellipsis(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("cat", "d" * 120, "c" * 121)
    monkeypatch.setattr(Pictures, "classnames", names)
    (shown, *_) = examples(PREDICTIONS, Pictures(10), 10)
    assert (shown.truth, *shown.predicted) == (names[1], "c" * 119 + "…")


def test_confusions_and_weakest_classes() -> None:
    assert confusions(PREDICTIONS, Pictures.classnames, 2) == [("dog", "cow", 2), ("cat", "dog", 1)]
    assert weakest_classes(PREDICTIONS, (*Pictures.classnames, "absent"), 9) == [
        ("dog", 0.0, 3),
        ("cat", 0.5, 2),
        ("cow", 1.0, 1),
    ]


def test_multi_label_mistakes() -> None:
    predictions = {
        "keys": np.array(["0", "1", "3"]),
        "index": np.array([0, 1, 3]),
        "labels": np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]]),
        "scores": np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 9.0]]),
    }
    shown = examples(predictions, Pictures(4), 5)
    assert [(each.truth, *each.predicted) for each in shown] == [("dog", "cat"), ("none", "cow")]
    assert weakest_classes(predictions, Pictures.classnames, 9) == [("cat", 0.5, 1), ("dog", 1.0, 2)]


def test_the_page_names_no_class_without_a_mistake(evaluated: Any) -> None:
    report, out, tasks = evaluated
    predictions = read_predictions(out, "mnist")
    right = {NAMES[i] for i in range(10) if (predictions["top"][predictions["labels"] == i, 0] == i).all()}
    cells = re.findall("<tr><td[^>]*>([^<]*)</td><td>([0-9.]+)</td>", to_html(report, out, tasks[:1]))
    weakest = {name for name, value in cells if name.startswith("digit")}
    assert weakest and not weakest & right and "100.0" not in dict(cells).values()


def test_no_mistakes_and_no_results(evaluated: Any, tmp_path: pathlib.Path) -> None:
    correct = {"index": np.arange(2), "labels": np.array([0, 1]), "top": np.array([[0], [1]])}
    assert examples(correct, Pictures(2), 5) == [] == confusions(correct, Pictures.classnames, 5)
    report = type(evaluated[0])({}, {"cars": "no such folder"})
    assert "Evaluation of nothing" in Page(to_html(report, tmp_path, ())).words


def test_a_page_without_a_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "model", "--data", "digits", "--html", "page.html"]) == 2
    assert capsys.readouterr().err == (
        "tclip evaluate: error: --html needs --out DIR: the page shows the predictions in that folder\n"
    )


def test_retrieval_shows_the_worst_ranks(evaluated: Any) -> None:
    _, out, tasks = evaluated
    predictions = read_predictions(out, "flickr8k")
    shown = examples(predictions, tasks[2].open()[1], 3)
    ranks = [int(each.predicted[0].split()[4].replace(",", "")) for each in shown]
    assert ranks == [1 + rank for rank in sorted(predictions["text_rank"], reverse=True)[:3]]


def test_the_page_of_a_comparison_shows_changed_images(
    evaluated: Any, tmp_path: pathlib.Path, exports: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, tasks = evaluated
    table = {
        f"{template.format(c=name)}": np.eye(3)[i % 3] for template in exports.TEMPLATES for i, name in enumerate(NAMES)
    }
    evaluate(exports.Direct(table=table), tasks[:1], model="other", out=tmp_path / "other")
    arguments = ["evaluate", "compare", str(out), str(tmp_path / "other"), "--resamples", "100", "--html"]
    assert main([*arguments, str(tmp_path / "bare.html")]) == 1
    bare = Page((tmp_path / "bare.html").read_text())
    assert main([*arguments, str(tmp_path / "full.html"), "--data", str(tmp_path / "exports")]) == 1
    full = Page((tmp_path / "full.html").read_text())
    assert len(bare.addresses) == 2 < len(full.addresses) <= 16
    for side in ("A: ", "B: "):
        assert sum(word.startswith(side) for word in full.words) == len(full.addresses) - 2
    assert "4 of 4 lost: correct in A, wrong in B" in full.words
    exports.write(tmp_path / "exports" / "wds_mnist", [0], NAMES, shards=1)
    assert main([*arguments, str(tmp_path / "gone.html"), "--data", str(tmp_path / "exports")]) == 1
    words = Page((tmp_path / "gone.html").read_text()).words
    assert any(word.endswith("wds_mnist: the data has changed since the evaluation") for word in words)


def colored(html: str) -> list[tuple[str | None, str]]:
    """Return (class, text) of the lines below the images, without the names."""
    page = Page(html)
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    return [each for each in zip(kinds, page.words, strict=True) if each[0] != "note"]


def test_a_changed_image_has_both_predictions() -> None:
    keys = np.array(["0", "3", "5", "7"])
    first = {"keys": keys, "index": np.array([0, 3, 5, 7]), "labels": np.array([0, 1, 2, 0])}
    first["top"] = np.array([[0], [1], [0], [2]])
    second = {name: array[::-1] for name, array in first.items()}
    second["top"] = np.array([[0], [2], [2], [1]])  # of 7, 5, 3, 0
    shown = changed(first, second, ["0", "3", "7"], Pictures(10), 7)
    assert [(each.truth, *each.predicted) for each in shown] == [
        ("cat", "cat", "dog"),
        ("dog", "dog", "cow"),
        ("cat", "cow", "cat"),
    ]
    # The truth is not repeated where one of the predictions is right.
    lines = [*zip(*[iter(colored(cards(shown)))] * 2, strict=True)]
    assert lines == [
        (("good", "A: cat"), ("bad", "B: dog")),
        (("good", "A: dog"), ("bad", "B: cow")),
        (("bad", "A: cow"), ("good", "B: cat")),
    ]
    wrong = examples(PREDICTIONS, Pictures(10), 10)[:1]
    assert colored(cards(wrong)) == [("good", "dog"), ("bad", "cow")]
    with pytest.raises(ValueError, match=r"^image 7 is missing, not 7$"):
        changed(first, second, ["7"], Pictures(5), 7)
    second["top"] = np.array([[0], [3], [2], [1]])
    with pytest.raises(ValueError, match=r"^the predictions have 4 classes, but the data has 3$"):
        changed(first, second, ["3"], Pictures(10), 7)


def test_data_with_fewer_classes_than_the_predictions_is_refused() -> None:
    names = {"keys": np.array(["0"]), "index": np.array([0])}
    single = {"labels": np.array([3]), "top": np.array([[0]])}
    multi = {"labels": np.ones((1, 4)), "scores": np.ones((1, 4))}
    for arrays in (single, multi):
        with pytest.raises(ValueError, match=r"^the predictions have 4 classes, but the data has 3$"):
            examples(names | arrays, Pictures(10), 7)


def test_changed_images_come_from_the_evaluated_split(exports: types.SimpleNamespace, tmp_path: pathlib.Path) -> None:
    class Reversed(exports.Direct):  # type: ignore[misc, name-defined]
        def texts(self, texts: Any) -> Any:
            return super().texts(texts)[::-1]

    for encoder, side in ((exports.Direct(), "a"), (Reversed(), "b")):
        evaluate(encoder, [source_task("digits", "train", "none")], model=side, out=tmp_path / side)
    compared = compare_results(tmp_path / "a", tmp_path / "b", resamples=100)
    pictures = flipped(compared, None)["digits"]
    assert compared.rows[0].split == "train" and pictures.error == "" and pictures.lost + pictures.gained
