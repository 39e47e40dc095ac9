"""Zero-shot evaluation against a plain float64 implementation, one class, caption and image at a time."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from tclip_jax.data.images import decode, preprocess
from tclip_jax.data.sources import Record, open_source
from tclip_jax.evaluation.zero_shot import class_embeddings, classify, classify_several, retrieve

Floats = npt.NDArray[np.float64]


class Pictures:
    """Records of single-colour images, some of them unreadable."""

    def __init__(
        self, classnames: Sequence[str], colours: Sequence[int | None], labels: Sequence[int | npt.NDArray[np.int32]]
    ) -> None:
        self.classnames = tuple(classnames)
        self._records = [
            Record(b"no image" if c is None else np.eye(3, dtype=np.uint8)[[[c] * 5] * 6] * 255, (), label, f"p/{i}")
            for i, (c, label) in enumerate(zip(colours, labels, strict=True))
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def unit(x: Floats) -> Floats:
    return x / np.sqrt((x * x).sum())


def plain_logits(exports: types.SimpleNamespace, source: object, names: Sequence[str]) -> Floats:
    """Return 100 · cosine of every image and class, from the definition."""
    model = exports.Direct(batch_size=1)
    classes = []
    for name in names:
        captions = [unit(model.texts([line.replace("{c}", name)])[0].astype(np.float64)) for line in exports.TEMPLATES]
        classes.append(unit(np.mean(captions, axis=0)))
    rows = []
    for i in range(len(source)):  # type: ignore[arg-type]
        pixels = preprocess(decode(source[i].image), model.preprocess)  # type: ignore[index]
        image = model.images(pixels[None])[0].astype(np.float64)
        rows.append([100 * float(unit(image) @ each) for each in classes])
    return np.array(rows)


def test_classification_equals_the_plain_implementation(exports: types.SimpleNamespace, tmp_path: pathlib.Path) -> None:
    names = [f"thing {i}" for i in range(7)]
    labels = [i * 3 % 7 for i in range(30)]
    source = open_source(f"wds:{exports.write(tmp_path / 'wds_x', labels, names, suffix='jpg')}", "test")
    outcome = classify(exports.Direct(4), source, exports.TEMPLATES)

    logits = plain_logits(exports, source, names)
    order = [sorted(range(7), key=lambda c, row=row: -row[c]) for row in logits]  # type: ignore[misc]
    assert outcome.predictions["top"].tolist() == [each[:5] for each in order]
    correct = [each[0] == label for each, label in zip(order, labels, strict=True)]
    assert outcome.metrics["acc1"] == pytest.approx(np.mean(correct))
    assert outcome.metrics["acc5"] == pytest.approx(
        np.mean([label in each[:5] for each, label in zip(order, labels, strict=True)])
    )
    per_class = [np.mean([hit for hit, label in zip(correct, labels, strict=True) if label == c]) for c in range(7)]
    assert outcome.metrics["mean_per_class_recall"] == pytest.approx(np.mean(per_class))
    assert outcome.predictions["labels"].tolist() == labels and outcome.predictions["index"].tolist() == [*range(30)]
    assert outcome.predictions["keys"][16] == "wds_x/test/1.tar/s0000016" and outcome.failed == {}


def test_multi_label_classification_equals_the_plain_implementation(
    exports: types.SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    names = ["cat", "dog", "tree frog"]
    vectors = [np.array(v) for v in np.random.default_rng(0).integers(0, 2, (11, 3))]
    source = open_source(f"wds:{exports.write(tmp_path / 'wds_x', vectors, names)}", "test")
    outcome = classify_several(exports.Direct(), source, exports.TEMPLATES)
    logits = plain_logits(exports, source, names)
    np.testing.assert_allclose(outcome.predictions["scores"], logits, atol=1e-4)
    np.testing.assert_array_equal(outcome.predictions["labels"], vectors)
    precisions = []
    for c in range(3):
        ranked = [vectors[i][c] for i in sorted(range(11), key=lambda i: -logits[i][c])]
        at_hits = [sum(ranked[: i + 1]) / (i + 1) for i in range(11) if ranked[i]]
        precisions.append(np.mean(at_hits))
    assert outcome.metrics == {"mean_average_precision": pytest.approx(np.mean(precisions))}


def test_retrieval_of_images_with_several_captions(exports: types.SimpleNamespace, tmp_path: pathlib.Path) -> None:
    texts = [[f"caption {i} {j}" for j in range(1 + i % 3)] for i in range(13)]
    source = open_source(f"wds:{exports.write(tmp_path / 'wds_x', texts)}", "test")
    outcome = retrieve(exports.Direct(5), source)
    model = exports.Direct(1)
    images = [model.images(preprocess(decode(source[i].image), model.preprocess)[None])[0] for i in range(13)]
    owners = [i for i, captions in enumerate(texts) for _ in captions]
    scores = np.array([[model.texts([text])[0] @ image for image in images] for captions in texts for text in captions])
    for k in (1, 5, 10):
        of_caption = [
            owner in sorted(range(13), key=lambda i: -row[i])[:k] for owner, row in zip(owners, scores, strict=True)
        ]
        of_image = [
            i in {owners[j] for j in sorted(range(len(owners)), key=lambda j: -scores[j][i])[:k]} for i in range(13)
        ]
        assert outcome.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(of_caption))
        assert outcome.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(np.mean(of_image))
    assert outcome.predictions["text_to_image"].tolist() == owners
    assert len(outcome.predictions["image_rank"]) == len(owners) and len(outcome.predictions["text_rank"]) == 13


def test_a_class_embedding_is_the_normalised_mean_of_its_captions(exports: types.SimpleNamespace) -> None:
    model = exports.Direct(table={"a": (1.0, 0.0), "an a": (0.0, 1.0), "b": (0.6, 0.8), "an b": (0.6, 0.8)})
    rows = class_embeddings(model, ["a", "b"], ["{c}", "an {c}"])
    np.testing.assert_allclose(rows, [[2**-0.5, 2**-0.5], [0.6, 0.8]], rtol=1e-6)


def test_classes_are_embedded_in_chunks(exports: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{i}" for i in range(10)]
    whole = class_embeddings(exports.Direct(), names, exports.TEMPLATES)
    monkeypatch.setattr("tclip_jax.evaluation.zero_shot._CHUNK", 12)
    np.testing.assert_array_equal(class_embeddings(exports.Direct(), names, exports.TEMPLATES), whole)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 128])
def test_unusable_images_are_left_out_and_counted(exports: types.SimpleNamespace, batch_size: int) -> None:
    model = exports.Direct(batch_size, {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)})
    source = Pictures(["red", "blue"], [0, None, 2, 0, 2, 2, None], [0, 1, 1, 2, 0, 1, -1])
    outcome = classify(model, source, "none")
    assert outcome.failed == {"unreadable image": 2, "label missing or out of range": 1} and outcome.samples == 4
    assert outcome.predictions["index"].tolist() == [0, 2, 4, 5]
    assert outcome.predictions["labels"].tolist() == [0, 1, 0, 1]
    assert outcome.predictions["top"].tolist() == [[0, 1], [1, 0], [1, 0], [1, 0]]
    assert outcome.metrics["acc1"] == 0.75 and np.isnan(outcome.metrics["acc5"])
    assert outcome.metrics["mean_per_class_recall"] == 0.75


def test_images_without_captions_or_valid_labels_are_left_out(
    exports: types.SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    texts = [["a"], [""], [" ", ""], ["b", "c"]]
    captioned = open_source(f"wds:{exports.write(tmp_path / 'a', texts, images={3: b'no image'}, shards=1)}", "test")
    outcome = retrieve(exports.Direct(), captioned)
    assert outcome.failed == {"unreadable image": 1, "no caption": 2} and outcome.predictions["index"].tolist() == [0]
    vectors = [np.array([0, 1]), np.array([1, 2]), np.array([1, 0, 1]), np.array(["1", "0"]), np.array([1.0, 1.0])]
    several = open_source(f"wds:{exports.write(tmp_path / 'b', vectors, ['x', 'y'], shards=1)}", "test")
    outcome = classify_several(exports.Direct(), several, "none")
    assert outcome.failed == {"label missing or out of range": 3} and outcome.predictions["index"].tolist() == [0, 4]


def test_sources_that_cannot_be_evaluated_are_refused(exports: types.SimpleNamespace) -> None:
    model = exports.Direct(2, {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)})
    with pytest.raises(ValueError, match=r"^no usable image: 2 x unreadable image, 1 x label missing or out of range$"):
        classify(model, Pictures(["red", "blue"], [None, 0, None], [0, 5, 1]), "none")
    with pytest.raises(ValueError, match=r"^zero-shot classification needs class names, but the source has captions$"):
        classify(model, Pictures([], [0], [-1]), "none")
    with pytest.raises(ValueError, match=r"^the source has no images$"):
        classify(model, Pictures(["red"], [], []), "none")
    broken = exports.Direct(2, {"red": (float("nan"), 0.0, 0.0), "blue": (0.0, 0.0, 1.0)})
    broken.images = lambda pixels: np.full((2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="the model's embeddings are not finite"):
        classify(broken, Pictures(["red", "blue"], [0], [0]), "none")
