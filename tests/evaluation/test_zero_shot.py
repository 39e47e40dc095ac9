"""Zero-shot classification against a plain float64 rendering of it, one class and one image at a time."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tclip_jax.artifacts.model import Model
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import Record, open_source
from tclip_jax.evaluation.zero_shot import Classification, class_embeddings, classify
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

CONFIG = CLIPConfig(
    8,
    VisionConfig((16, 16), patch_size=8, width=16, layers=1, head_width=8),
    TextConfig(context_length=16, width=8, heads=1, layers=1),
)
TEMPLATES = ("a photo of a {c}.", "{c}", "a bad drawing of the {c}")
Floats = npt.NDArray[np.float64]


class Pictures:
    """Labelled random images of several sizes, some of them no images."""

    def __init__(self, classnames: Sequence[str], labels: Sequence[int], unreadable: Sequence[int] = ()) -> None:
        self.classnames = tuple(classnames)
        rng = np.random.default_rng(0)
        pixels = [rng.integers(0, 256, (16 + i, 20, 3), np.uint8) for i in range(len(labels))]
        self._records = [
            Record(b"no image" if i in unreadable else pixels[i], (), label, f"pictures/{i}")
            for i, label in enumerate(labels)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


class Direct:
    """Stands for a model: captions have the embeddings of a table, images their mean colour's."""

    preprocess = Preprocess(4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __init__(self, table: dict[str, tuple[float, ...]]) -> None:
        self._table = table

    def encode_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([self._table[text] for text in texts], np.float32)

    def encode_image(self, pixels: npt.NDArray[Any], batch_size: int) -> npt.NDArray[np.float32]:
        assert len(pixels) == batch_size, "every batch is of one shape, so that it is compiled once"
        colours = pixels.mean(axis=(1, 2))
        return colours / np.maximum(np.linalg.norm(colours, axis=-1, keepdims=True), 1e-12)


def unit(x: Floats) -> Floats:
    return x / np.sqrt((x * x).sum())


def test_logits_are_those_of_a_plain_rendering() -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(CONFIG))
    model = Model(CONFIG, Preprocess(16), params)
    source = Pictures(["cat", "dog", "tree frog"], [2, 0, 1, 1, 2])
    outcome = classify(model, source, TEMPLATES, batch_size=1)

    texts = [template.replace("{c}", name) for template in reversed(TEMPLATES) for name in source.classnames]
    embedded = dict(zip(texts, model.encode_text(texts).astype(np.float64), strict=True))
    classes = []
    for name in source.classnames:
        captions = [unit(embedded[template.replace("{c}", name)]) for template in TEMPLATES]
        classes.append(unit(np.mean(captions, axis=0)))
    for i in range(len(source)):
        image = model.encode_image(Image.fromarray(source[i].image))[0].astype(np.float64)
        expected = [100 * float(unit(image) @ each) for each in classes]
        np.testing.assert_allclose(outcome.logits[i], expected, atol=1e-4)
    assert outcome.logits.dtype == np.float32 and outcome.logits.shape == (5, 3)
    np.testing.assert_array_equal(outcome.labels, [2, 0, 1, 1, 2])
    right = sum(int(np.argmax(row)) == label for row, label in zip(outcome.logits, outcome.labels, strict=True))
    assert outcome.accuracy == right / 5 and outcome.unreadable == 0


def test_a_class_is_the_normalised_mean_over_its_captions() -> None:
    model = Direct({"a": (1.0, 0.0), "an a": (0.0, 1.0), "b": (0.6, 0.8), "an b": (0.6, 0.8)})
    rows = class_embeddings(model, ["a", "b"], ["{c}", "an {c}"])  # type: ignore[arg-type]
    np.testing.assert_allclose(rows, [[2**-0.5, 2**-0.5], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 128])
def test_unreadable_images_are_counted_and_left_out_in_place(batch_size: int) -> None:
    model = Direct({"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)})
    whole = classify(model, Pictures(["red", "blue"], [0, 1, 1, 0, 1, 0, 0]), "none", 7)  # type: ignore[arg-type]
    source = Pictures(["red", "blue"], [0, 1, 1, 0, 1, 0, 0], unreadable=(1, 6))
    outcome = classify(model, source, "none", batch_size)  # type: ignore[arg-type]
    assert outcome.unreadable == 2
    np.testing.assert_array_equal(outcome.labels, [0, 1, 0, 1, 0])
    np.testing.assert_allclose(outcome.logits, whole.logits[[0, 2, 3, 4, 5]], rtol=1e-6)


def test_without_a_readable_image_there_is_no_accuracy() -> None:
    model = Direct({"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)})
    outcome = classify(model, Pictures(["red", "blue"], [0, 1], (0, 1)), "none", 2)  # type: ignore[arg-type]
    assert outcome.unreadable == 2 and outcome.logits.shape == (0, 2) and np.isnan(outcome.accuracy)


def test_predictions_and_accuracy() -> None:
    logits = np.array([[1, 3, 2], [9, 0, 0], [0, 0, 1], [5, 5, 4]], np.float32)
    outcome = Classification(np.array([1, 2, 2, 0], np.int32), logits, 0)
    assert outcome.predictions.tolist() == [1, 0, 2, 0] and outcome.accuracy == 0.75


def test_a_captioned_source_is_refused(tmp_path: pathlib.Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a black square")
    untouched = types.SimpleNamespace()  # refused before the model is asked for anything
    with pytest.raises(ValueError, match=r"^zero-shot classification needs a labelled source: this one has captions$"):
        classify(untouched, open_source(f"folder:{tmp_path}", "test"), "simple")  # type: ignore[arg-type]
