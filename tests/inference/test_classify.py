"""Zero-shot labels for image files."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.inference.classify import Guess, classify_images, guess_table
from tclip_jax.inference.inputs import Failure
from tclip_jax.inference.model import Model

LABELS = ["cat", "dog", "a <b>"]


def test_probabilities_are_the_softmax_of_scaled_cosines(model: Model, readable: list[epath.Path]) -> None:
    guesses = classify_images(model, list(map(str, readable)), LABELS, ["{c}", "a photo of a {c}."], batch_size=2)
    images = model.encode_image([Image.open(path) for path in readable]).astype(np.float64)
    texts = model.encode_text([text for label in LABELS for text in (label, f"a photo of a {label}.")])
    means = texts.astype(np.float64).reshape(3, 2, -1).mean(axis=1)
    exp = np.exp(model.logit_scale * images @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T)
    for guess, row, path in zip(guesses, exp / exp.sum(axis=1, keepdims=True), readable, strict=True):
        assert isinstance(guess, Guess) and guess.name == str(path)
        assert list(guess.labels) == [LABELS[i] for i in np.argsort(-row)]
        assert [guess.labels[label] for label in LABELS] == pytest.approx(row, abs=1e-5)


def test_a_bias_of_the_logits_gives_each_label_its_own_probability(model: Model, readable: list[epath.Path]) -> None:
    biased = dataclasses.replace(model, params=model.params | {"logit_bias": np.float32(-3.0)})
    paths = list(map(str, readable))
    guesses, softmax = (classify_images(each, paths, LABELS, ["{c}"]) for each in (biased, model))
    images = model.encode_image([Image.open(path) for path in readable]).astype(np.float64)
    logits = model.logit_scale * images @ model.encode_text(LABELS).astype(np.float64).T - 3
    for guess, before, row in zip(guesses, softmax, logits, strict=True):
        assert isinstance(guess, Guess) and isinstance(before, Guess)
        assert list(guess.labels) == list(before.labels)  # the order is the same
        assert [guess.labels[label] for label in LABELS] == pytest.approx(1 / (1 + np.exp(-row)), rel=1e-4)
    # Logits of large models are below −88, where the exponential overflows in float32.
    extreme = dataclasses.replace(model, params=model.params | {"logit_bias": np.float32(-300.0)})
    assert all(
        0 <= share < 1e-38 for guess in classify_images(extreme, paths, LABELS) for share in guess.labels.values()
    )  # type: ignore[union-attr]
    alone = classify_images(biased, paths, LABELS[:1], ["{c}"])
    assert [guess.labels[LABELS[0]] for guess in alone] == pytest.approx([g.labels[LABELS[0]] for g in guesses])  # type: ignore[union-attr]


def test_outcomes_are_in_the_order_of_the_paths(model: Model, pictures: pathlib.Path) -> None:
    paths = [str(pictures / name) for name in ("absent.png", "0.png", "b/broken.png", "0.png")]
    outcomes = classify_images(model, paths, LABELS, batch_size=2)
    assert [type(outcome) for outcome in outcomes] == [Failure, Guess, Failure, Guess]
    assert outcomes[0] == Failure(paths[0], "No such file or directory")
    assert classify_images(model, paths[2:3], LABELS)[0].name == paths[2]


@pytest.mark.parametrize("labels", [[], ["cat", "cat"], ["cat", ""]])
def test_invalid_labels_are_refused(model: Model, labels: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^labels are .*: they must be unique and not empty"):
        classify_images(model, [], labels)


def test_the_table_is_aligned() -> None:
    table = guess_table([Guess("a.png", {"cat": 0.75, "dog": 0.25}), Guess("long.png", {"dog": 1.0, "cat": 0.0})])
    assert table == "a.png     cat   75.0%  dog  25.0%\nlong.png  dog  100.0%  cat   0.0%"


def test_the_command(
    artifact: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = str(pictures / "0.png"), str(pictures / "b" / "broken.png")
    assert main(["classify", str(artifact), good, bad, "--labels", "cat, dog"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{good}  ") and captured.out.count("\n") == 1 and captured.out.count("%") == 2
    assert captured.err.startswith(f"{bad}: not a usable image") and captured.err.count("\n") == 1
    (tmp_path / "labels").write_text("cat\n\ndog\nbird\n")
    arguments = ["classify", str(artifact), good, bad, "--labels-file", str(tmp_path / "labels"), "--json"]
    assert main([*arguments, "--templates", "{c}", "the {c}"]) == 1
    guess, failure = json.loads(capsys.readouterr().out)
    assert set(guess["labels"]) == {"cat", "dog", "bird"} and sum(guess["labels"].values()) == pytest.approx(1)
    assert failure["image"] == bad and failure["error"].startswith("not a usable image")
    assert main([*arguments, "--templates", "opnai"]) == 2
    assert "no such name; use openai" in capsys.readouterr().err


@pytest.mark.parametrize("labels", ["labels.txt", "./names"])
def test_a_file_is_not_taken_for_a_label(
    labels: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").write_text("cat\ndog\n")
    assert main(["classify", "artifact", "cat.jpg", "--labels", labels]) == 2
    assert capsys.readouterr().err == (
        f"tclip classify: error: --labels {labels} is one label: for a file of labels, write --labels-file {labels}\n"
    )
