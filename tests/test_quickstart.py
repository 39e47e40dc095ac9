"""The report of the quick start: a valid PNG whose plots show the numbers of the run."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from tclip_jax.quickstart import plot_curves, plot_dynamics, plot_predictions, plot_trits, write_picture
from tclip_jax.ternary import TernaryTensor

CURVES = {
    "teacher": [{"step": 1, "loss/task": 3.0}, {"step": 2, "loss/task": 2.5}, {"step": 2, "zero_shot_accuracy": 0.875}],
    "student": [{"step": 1, "loss/task": 4.0}, {"step": 3, "zero_shot_accuracy": 0.25}],
}


def trits(*shape: int) -> TernaryTensor:
    values = np.random.default_rng(sum(shape)).choice(np.array([-1, 0, 1], np.int8), shape, p=[0.3, 0.6, 0.1])
    return TernaryTensor(values, np.ones((*shape[:-2], 1, shape[-1]), np.float32), shape[-2])  # type: ignore[arg-type]


PARAMS: dict[str, Any] = {
    "image": {"blocks": {"mlp": {"fc1": {"kernel": trits(2, 10, 20), "bias": np.zeros((2, 20))}}}},
    "text": {"token_embedding": {"embedding": trits(30, 10)}},
    "logit_scale": np.float32(1),
}


def picture(path: pathlib.Path, **changes: Any) -> Image.Image:
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(10)]
    arguments = {
        "curves": CURVES,
        "params": PARAMS,
        "images": images,
        "predicted": ["a cat"] * 10,
        "correct": [True] * 10,
    }
    write_picture(path, **(arguments | changes))
    with Image.open(path) as image:
        image.load()
    return image


def test_the_report_is_a_valid_png(tmp_path: pathlib.Path) -> None:
    image = picture(tmp_path / "report.png")
    assert image.format == "PNG"
    assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": {"teacher": CURVES["teacher"][:2], "student": []}},  # no evaluation
        {"params": {"logit_scale": np.float32(1)}},
        {"images": [], "predicted": [], "correct": []},
        {"predicted": ["costs $5_a} or ${x", *["a cat"] * 9]},  # dollar signs are text, not mathematics
    ],
    ids=["no accuracies", "no trits", "no images", "dollars"],
)
def test_the_report_of_a_run_without_some_results(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    assert picture(tmp_path / "report.png", **changes).format == "PNG"


def test_curves_are_the_metrics() -> None:
    loss, accuracy = Figure().subplots(1, 2)
    plot_curves(loss, CURVES, "loss/task", "loss")
    plot_curves(accuracy, CURVES, "zero_shot_accuracy", "accuracy")
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 3.0], [2, 2.5]], [[1, 4.0]]]
    assert [line.get_label() for line in loss.lines] == ["teacher", "student"]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[2, 87.5]], [[3, 25.0]]]
    assert [line.get_label() for line in accuracy.lines] == ["teacher 87.5 %", "student 25.0 %"]
    assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_title()) == ("", "%", "accuracy")


def test_bars_are_the_shares_of_trits_per_layer() -> None:
    axes = Figure().subplots()
    plot_trits(axes, PARAMS)
    fc1 = PARAMS["image"]["blocks"]["mlp"]["fc1"]["kernel"].trits
    table = PARAMS["text"]["token_embedding"]["embedding"].trits
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "image 0 fc1",
        "image 1 fc1",
        "text token embedding",
    ]
    for trit, bars in zip((-1, 0, 1), axes.containers, strict=True):
        assert bars.get_label() == {-1: "-1", 0: "0", 1: "+1"}[trit]
        expected = [100 * np.count_nonzero(layer == trit) / layer.size for layer in (*fc1, table)]
        np.testing.assert_allclose([bar.get_width() for bar in bars], expected)
    np.testing.assert_allclose([bar.get_x() + bar.get_width() for bar in axes.containers[-1]], 100)


def test_dynamics_are_the_means_over_layers(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)

    def snapshot(step: int) -> dict[str, Any]:
        names = ("zeros", "flips", "saturated", "scale", "drift")
        values = {name: rng.random(2).tolist() for name in names} | {"histogram": rng.random((2, 18)).tolist()}
        return {"step": step, "trits": {"image/blocks/mlp/fc1/kernel": values}}

    snapshots = [snapshot(100), snapshot(200)]
    axes = Figure().subplots(1, 5)
    plot_dynamics(axes, snapshots)
    for each, name in zip(axes, ("zeros", "flips", "drift", "saturated"), strict=False):
        values = [100 * np.mean(x["trits"]["image/blocks/mlp/fc1/kernel"][name]) for x in snapshots]
        np.testing.assert_allclose(each.lines[0].get_xydata(), list(zip((100, 200), values, strict=True)))
    histogram = snapshots[1]["trits"]["image/blocks/mlp/fc1/kernel"]["histogram"]
    np.testing.assert_allclose(axes[4].patches[0].get_data().values, np.mean(histogram, 0)[:-1])
    assert axes[0].lines[0].get_label() == "image fc1"
    report = picture(tmp_path / "dynamics.png", curves={"student": [*CURVES["student"], *snapshots]})
    assert report.height > picture(tmp_path / "report.png").height  # a further row of plots


def test_each_image_is_below_its_predicted_caption() -> None:
    figure = Figure()
    images = [np.full((4, 4, 3), i, np.uint8) for i in range(3)]
    plot_predictions(figure, images, ["a one", "a two", "a six"], [True, False, True], columns=2)
    drawn = [(axes.get_title(), axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len(figure.axes) == 4 and [title for title, _ in drawn] == ["a one", "a two", "a six"]
    for image, (_, array) in zip(images, drawn, strict=True):
        np.testing.assert_array_equal(array, image)
    red, green = (1, 0), (0, 1)  # which of the two channels is stronger
    colours = [to_hex(axes.title.get_color()) for axes in figure.axes[:3]]
    stronger = [red if int(colour[1:3], 16) > int(colour[3:5], 16) else green for colour in colours]
    assert stronger == [green, red, green]
