"""Probes against scikit-learn, the search for C, the cache of embeddings, and `tclip evaluate probe`."""

from __future__ import annotations

import io
import json
import math
import pathlib
import re
import types
import warnings
from typing import Any

import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.data.sources import BadSample, Record, open_source
from tclip_jax.evaluation import embeddings as embeddings_module
from tclip_jax.evaluation import probe as probe_module
from tclip_jax.evaluation.comparison import compare_results
from tclip_jax.evaluation.embeddings import LabelledEmbeddings, labelled_embeddings
from tclip_jax.evaluation.probe import STRENGTHS, few_shot, linear_probe, search, t_interval
from tclip_jax.evaluation.probe_suite import Pair, probe, suite_pairs
from tclip_jax.evaluation.results import read_predictions, read_result
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

DIGITS = {split: open_source("digits", split) for split in ("train", "test")}


def pixels(split: str) -> tuple[Any, Any]:
    """Return the digits as unit vectors of their pixels, and their labels."""
    records = [DIGITS[split][i] for i in range(len(DIGITS[split]))]
    rows = np.stack([record.image[..., 0].ravel() for record in records]).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.array([record.label for record in records])


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use three strengths instead of 97."""
    monkeypatch.setattr(probe_module, "STRENGTHS", np.array([0.1, 1.0, 10.0]))
    monkeypatch.setattr(probe_module, "_COARSE", 1)


def test_the_linear_probe_equals_scikit_learn(coarse: None) -> None:
    (train, labels), (test, truth) = pixels("train"), pixels("test")
    fit = linear_probe(train, labels, test, seed=3)

    rng = np.random.default_rng(3)
    order = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    held = np.concatenate([each[: round(len(each) / 5)] for each in order])
    rest = np.setdiff1d(np.arange(len(labels)), held)
    scores = {}
    for c in (0.1, 1.0, 10.0):
        model = LogisticRegression(C=c, max_iter=1000).fit(train[rest], labels[rest])
        scores[c] = model.score(train[held], labels[held])
    assert fit.c == max(scores, key=scores.__getitem__)
    plain = LogisticRegression(C=fit.c, max_iter=1000).fit(train, labels)
    np.testing.assert_array_equal(fit.top[:, 0], plain.predict(test))
    best = np.argsort(-plain.predict_proba(test), axis=1)[:, :5]
    assert np.mean(fit.top == best) > 0.999 and fit.top.dtype == np.int32
    assert np.mean(fit.top[:, 0] == truth) > 0.9


def test_few_shot_draws_equally_from_every_class(coarse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (test, truth) = pixels("train"), pixels("test")
    fitted, plain = [], probe_module._fit
    monkeypatch.setattr(probe_module, "_fit", lambda x, y, c: fitted.append((x, y)) or plain(x, y, c))
    chosen, choose = [], probe_module._choose
    monkeypatch.setattr(probe_module, "_choose", lambda *arguments: chosen.append(arguments) or choose(*arguments))
    accuracies = []
    for shots, seed in ((1, 0), (8, 0), (8, 1)):
        fit = few_shot(train, labels, test, shots=shots, seed=seed)
        rows, classes = fitted[-1]
        assert np.bincount(classes).tolist() == [shots] * 10
        _, _, held_out, truth_held_out = chosen[-1]
        assert np.bincount(truth_held_out).tolist() == [min(shots, 4)] * 10
        assert not {row.tobytes() for row in rows} & {row.tobytes() for row in held_out}
        accuracies.append(np.mean(fit.top[:, 0] == truth))
    assert accuracies[0] < min(accuracies[1:]) and accuracies[1] != accuracies[2]
    again = few_shot(train, labels, test, shots=8, seed=1)
    assert np.mean(again.top[:, 0] == truth) == accuracies[2]


@pytest.mark.parametrize("peak", [0, 1, 31, 50, 96])
def test_search_finds_a_single_peak_in_few_steps(peak: int) -> None:
    scored: list[int] = []
    assert search(lambda i: scored.append(i) or -abs(i - peak), 97, 16) == peak
    assert len(set(scored)) == len(scored) <= 15
    assert search(lambda i: 0.0, 97, 16) == 0, "ties select the strongest regularisation"


def test_strengths_are_those_of_clip() -> None:
    assert len(STRENGTHS) == 97 and STRENGTHS[0] == 1e-6 and STRENGTHS[-1] == 1e6
    np.testing.assert_allclose(np.diff(np.log10(STRENGTHS)), 1 / 8, atol=1e-12)


def test_a_probe_of_two_classes(coarse: None) -> None:
    (train, labels), (test, _) = pixels("train"), pixels("test")
    two = np.isin(labels, (3, 7))
    fit = linear_probe(train[two], labels[two], test)
    assert fit.top.shape == (len(test), 2) and set(fit.top.ravel()) == {3, 7}


def test_t_interval_equals_scipy() -> None:
    values = [0.5, 0.6, 0.55, 0.7]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert all(map(math.isnan, t_interval([0.5])))
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: linear_probe(x, y * 0, x), "^the training images have 1 class: a probe needs at least 2$"),
        (lambda x, y: few_shot(x, y, x, shots=4, seed=0), "^class 0 has 3 training images, fewer than 4 shots$"),
        (lambda x, y: few_shot(x, y, x, shots=3, seed=0), "^no training image is left to select the regularisation"),
        (lambda x, y: linear_probe(x[:2], np.array([0, 1]), x), "^no training image is left"),
    ],
)
def test_too_few_images_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(np.eye(6, dtype=np.float32), np.array([0, 0, 0, 1, 1, 1]))


def test_embeddings_are_computed_once(
    tmp_path: pathlib.Path, exports: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [0, 1, 2, 1, 7]
    folder = exports.write(tmp_path / "data", labels, ["a", "b", "c"], images={1: b"broken"})
    source = open_source(f"wds:{folder}", "test")
    first = labelled_embeddings(exports.Direct(), source, weights="w", cache=tmp_path / "cache")
    assert first.labels.tolist() == [0, 2, 1] and first.places.tolist() == [0, 2, 3], "7 is out of range"
    assert first.embeddings.dtype == np.float32 and first.embeddings.shape == (3, 6)
    assert [key[-5:] for key in first.keys] == ["00000", "00002", "00003"]

    calls, plain = [], embeddings_module.encode_source
    monkeypatch.setattr(embeddings_module, "encode_source", lambda *a, **k: calls.append(1) or plain(*a, **k))
    again = labelled_embeddings(exports.Direct(), source, weights="w", cache=tmp_path / "cache")
    assert not calls and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = exports.Direct()
    other.dtype = "bfloat16"
    labelled_embeddings(exports.Direct(), source, weights="other", cache=tmp_path / "cache")
    labelled_embeddings(other, source, weights="w", cache=tmp_path / "cache")
    (folder / "classnames.txt").write_text("c\nb\na\n")
    labelled_embeddings(exports.Direct(), open_source(f"wds:{folder}", "test"), weights="w", cache=tmp_path / "cache")
    exports.write(tmp_path / "data", labels, ["a", "b", "c"], images={4: exports.picture(99)})
    labelled_embeddings(exports.Direct(), open_source(f"wds:{folder}", "test"), weights="w", cache=tmp_path / "cache")
    labelled_embeddings(exports.Direct(), source, weights="w", cache=None)
    assert len(calls) == 5 and len(list((tmp_path / "cache").iterdir())) == 5


def test_an_unreadable_record_is_left_out(tmp_path: pathlib.Path, exports: types.SimpleNamespace) -> None:
    class Partial:
        classnames = ("a", "b")

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Record:
            if index == 3:
                raise BadSample("unreadable", "3", "the disk is gone")
            return Record(np.full((4, 4, 3), 40 * index, np.uint8), (), index % 2, str(index))

    labelled = labelled_embeddings(exports.Direct(), Partial(), weights="w", cache=tmp_path / "cache")
    assert labelled.keys.tolist() == ["0", "1", "2"]
    again = labelled_embeddings(exports.Direct(), Partial(), weights="w", cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.embeddings, labelled.embeddings)


def saved(save: Any, *arrays: Any, **named: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


SCALARS = dict.fromkeys(LabelledEmbeddings._fields, np.float32(0)) | {"embeddings": np.zeros((2, 6), np.float32)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        saved(np.save, np.zeros(3)),
        saved(np.savez, embeddings=np.array([{}], object)),
        saved(np.savez, **SCALARS),
    ],
    ids=["empty", "half", "one array", "a pickle", "scalars"],
)
def test_a_damaged_cache_is_refused(tmp_path: pathlib.Path, exports: types.SimpleNamespace, content: bytes) -> None:
    source = open_source(f"wds:{exports.write(tmp_path / 'data', [0, 1], ['a', 'b'])}", "test")
    labelled_embeddings(exports.Direct(), source, weights="w", cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: not embeddings: .*; delete it$"):
        labelled_embeddings(exports.Direct(), source, weights="w", cache=tmp_path / "cache")


def split_export(exports: types.SimpleNamespace, folder: pathlib.Path, per_class: int) -> None:
    """Write an export with a training split, taken from a second export."""
    names = ["a", "b", "c"]
    other = exports.write(folder.with_name("other"), [i % 3 for i in range(3 * per_class)], names)
    exports.write(folder, [i % 3 for i in range(9)], names, images={0: b"broken"})
    (other / "test").rename(folder / "train")


def test_a_suite_of_probes_resumes_and_compares(
    tmp_path: pathlib.Path, exports: types.SimpleNamespace, coarse: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_export(exports, tmp_path / "wds_mnist", 6)
    exports.write(tmp_path / "wds_cars", [0, 1], ["a", "b"])
    pairs = suite_pairs(tmp_path, "mnist,cars,flickr8k")
    options: Any = {"weights": "w", "shots": (1, 2), "seeds": 3, "cache": tmp_path / "cache"}
    for side in ("a", "b"):
        results, errors = probe(exports.Direct(), pairs, model=side, out=tmp_path / side, **options)
    assert [(each.task, each.samples) for each in results] == [("linear_probe", 8), ("1_shot", 8), ("2_shot", 8)]
    assert list(errors) == ["cars", "flickr8k"] and "wds_cars: no split 'train'; it has test" in errors["cars"]
    assert results[0].failed == {"test: unreadable or without a class": 1}
    linear, shots = (read_predictions(tmp_path / "a" / name, "mnist") for name in ("linear_probe", "2_shot"))
    assert results[0].metrics["acc1"] == np.mean(linear["top"][:, 0] == linear["labels"])
    assert results[2].metrics["acc1"] == pytest.approx(shots["share"].mean())
    assert set(np.round(3 * shots["share"], 6)) <= {0, 1, 2, 3}
    assert results[2].metrics["acc1_low"] <= results[2].metrics["acc1"] <= results[2].metrics["acc1_high"]
    assert math.isnan(results[0].metrics["acc5"]) and "C" in results[0].metrics
    assert read_result(tmp_path / "b" / "1_shot" / "mnist.json").metrics == pytest.approx(
        results[1].metrics, nan_ok=True
    )

    monkeypatch.setattr("tclip_jax.evaluation.probe_suite.labelled_embeddings", None)
    again, _ = probe(exports.Direct(), pairs[:1], model="b", out=tmp_path / "b", **options)
    assert [each.task for each in again] == ["linear_probe", "1_shot", "2_shot"]
    with pytest.raises(ValueError, match=r"mnist\.json: made with different inputs \(model\.weights: 'w', not 'v'\)"):
        probe(exports.Direct(), pairs, model="b", out=tmp_path / "b", **(options | {"weights": "v"}))

    for name in ("linear_probe", "1_shot"):
        compared = compare_results(tmp_path / "a" / name, tmp_path / "b" / name, resamples=100)
        assert not compared.refused and compared.rows[0].deltas["acc1"].delta == 0 and compared.rows[0].metric == "acc1"
        assert "C" not in compared.rows[0].deltas, "C is not a fraction"
    both = compare_results(tmp_path / "a", tmp_path / "b", resamples=100)
    assert [row.probe for row in both.rows] == ["linear_probe", "1_shot", "2_shot"] and not both.refused
    assert [row.name for row in both.rows] == ["mnist, linear probe", "mnist, 1 shot", "mnist, 2 shot"]
    assert both.rows[0].flips and both.rows[0].flips.lost == () and both.mean.delta == 0


class Classes:
    """Six single-colour images of each class in `shown`, which any probe can separate."""

    def __init__(self, names: tuple[str, ...], shown: tuple[str, ...]) -> None:
        self.classnames, self._shown, self.digest = names, shown, f"{names} {shown}"

    def __len__(self) -> int:
        return 6 * len(self._shown)

    def __getitem__(self, index: int) -> Record:
        name = self._shown[index % len(self._shown)]
        pixels = np.full((4, 4, 3), 3, np.uint8)
        pixels[..., "abc".index(name)] = 250 - index // len(self._shown)
        return Record(pixels, (), self.classnames.index(name), f"{index}")


@pytest.mark.parametrize(
    ("names", "shown", "expected"),
    [
        (("a", "b", "c"), ("a", "b", "c"), 1.0),
        (("a", "c"), ("a", "c"), 1.0),  # matching by index would classify every c wrongly
        (("c", "b", "a"), ("a", "b", "c"), 1.0),  # the same number of classes in another order
        (("z", "a", "b", "c"), ("a", "b"), 1.0),  # a class without images
        (("a", "b", "z"), ("a", "b"), 1.0),  # the same number of classes, one of them different
    ],
)
def test_classes_of_two_splits_are_matched_by_name(
    names: tuple[str, ...], shown: tuple[str, ...], expected: float, tmp_path: pathlib.Path, coarse: None
) -> None:
    splits = {"train": Classes(("a", "b", "c"), ("a", "b", "c")), "test": Classes(names, shown)}
    encoder: Any = Colours()
    options: Any = {"model": "m", "weights": "w", "shots": (1, 2), "seeds": 2}
    results, errors = probe(encoder, [Pair("colours", splits.__getitem__)], out=tmp_path, **options)
    assert not errors and [each.metrics["acc1"] for each in results] == [expected] * 3
    assert [each.metrics["mean_per_class_recall"] for each in results] == [expected] * 3
    assert results[0].made_by["data"]["test_classes"] == list(names)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (("a", "b"), ("a", "c"), r"test has images of 1 classes without training images: 'c'"),
        (("a", "b", "c"), ("b", "a", "a"), r"train and test have different classes, and two classes are named 'a'"),
    ],
)
def test_classes_that_cannot_be_matched_are_refused(
    train: tuple[str, ...], test: tuple[str, ...], message: str, tmp_path: pathlib.Path, coarse: None
) -> None:
    splits = {"train": Classes(train, train), "test": Classes(test, tuple(dict.fromkeys(test)))}
    encoder: Any = Colours()
    results, errors = probe(
        encoder, [Pair("x", splits.__getitem__)], model="m", weights="w", out=tmp_path, shots=(), seeds=1
    )
    assert not results and re.fullmatch(message, errors["x"])


@pytest.mark.parametrize("change", ["seeds", "train", "protocol"])
def test_a_result_is_reused_only_if_the_same_inputs_made_it(
    change: str, tmp_path: pathlib.Path, coarse: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = {"train": Classes(("a", "b"), ("a", "b")), "test": Classes(("a", "b"), ("a", "b"))}
    encoder: Any = Colours()

    def run(seeds: int, shots: tuple[int, ...]) -> Any:
        pairs = [Pair("x", splits.__getitem__)]
        return probe(encoder, pairs, model="m", weights="w", out=tmp_path, shots=shots, seeds=seeds)

    assert len(run(2, (1, 2))[0]) == 3 and len(run(3, ())[0]) == 1, "the linear probe has no seeds"
    if change == "train":
        splits["train"] = Classes(("a", "b", "c"), ("a", "b", "c"))
    if change == "protocol":
        monkeypatch.setattr(probe_module, "STRENGTHS", np.array([0.5, 1.0]))
    differs = {
        "seeds": r"task\.seeds: 2, not 3",
        "train": r".*data\.train: ",
        "protocol": r"task\.protocol\.strengths: ",
    }
    with pytest.raises(
        ValueError, match=rf"x\.json: made with different inputs \({differs[change]}.*choose another folder"
    ):
        run(3 if change == "seeds" else 2, (1, 2))


class Colours:
    """A fake encoder whose embedding is the mean colour."""

    preprocess, dtype, batch_size = Preprocess(4), "float32", 8
    made_by = types.MappingProxyType({"dtype": "float32"})

    def images(self, pixels: Any) -> Any:
        colours = pixels.mean(axis=(1, 2)) + 1e-3
        return (colours / np.linalg.norm(colours, axis=1, keepdims=True)).astype(np.float32)


def test_a_failed_probe_does_not_stop_the_others(
    tmp_path: pathlib.Path, exports: types.SimpleNamespace, coarse: None
) -> None:
    split_export(exports, tmp_path / "wds_mnist", 6)
    pairs, options = suite_pairs(tmp_path, "mnist"), {"weights": "w", "out": tmp_path / "out"}
    results, errors = probe(exports.Direct(), pairs, model="m", linear=False, shots=(50, 1, 60), seeds=1, **options)
    assert [each.task for each in results] == ["1_shot"]
    first, _, second = errors["mnist"].partition("; 60_shot: ")
    assert re.match(r"50_shot: class 0 has \d training images, fewer than 50 shots$", first) and "60 shots" in second


def test_both_splits_are_downloaded(tmp_path: pathlib.Path, exports: types.SimpleNamespace, hub: Any) -> None:
    split_export(exports, hub.root / "wds_mnist", 6)
    (pair,) = suite_pairs(tmp_path / "data", "mnist", download=True)
    assert [len(pair.open(split)) for split in ("train", "test")] == [18, 9]


def test_command(tmp_path: pathlib.Path, coarse: None, capsys: pytest.CaptureFixture[str]) -> None:
    vision = VisionConfig(image_size=(8, 8), patch_size=4, width=16, layers=1, head_width=8)
    config = CLIPConfig(8, vision, TextConfig(context_length=8, width=8, heads=1, layers=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config))
    same = {"config": config, "preprocess": Preprocess(8), "rules": (), "rest_dtype": "float32"}
    write_artifact(tmp_path / "model", **same, params=params)
    arguments = ["evaluate", "probe", str(tmp_path / "model"), "--data", "digits", "--out", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*arguments, "--shots", "2", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["digits", "linear", "probe"], ["digits", "2", "shot"]]
    assert main([*arguments, "--shots", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["task"] == "linear_probe" and 0.1 < result["metrics"]["acc1"] <= 1 and result["samples"] == 397
    assert main([*arguments, "--no-linear", "--shots"]) == 2
    assert "nothing to fit" in capsys.readouterr().err
    assert main([*arguments, "--shots", "--seeds", "3"]) == 2
    assert "--seeds is for few-shot probes: it needs --shots K" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--shots", "0"])
    assert "argument --shots: 0 is out of bounds: it must be at least 1" in capsys.readouterr().err
    assert main([*arguments[:4], "folder:/nowhere", *arguments[5:]]) == 2


def test_classes_are_ordered_also_if_probabilities_underflow() -> None:
    (train, labels), (test, _) = pixels("train"), pixels("test")
    plain = LogisticRegression(C=10.0, max_iter=1000).fit(train, labels)
    top = probe_module._classify(plain, 1e4 * test)
    assert (plain.predict_proba(1e4 * test) == 0).any()
    np.testing.assert_array_equal(top, np.argsort(-plain.decision_function(1e4 * test), axis=1)[:, :5])
