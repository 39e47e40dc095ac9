"""All 41 data sets against CLIP_benchmark: its metrics, and its evaluation of the exported model in PyTorch."""

from __future__ import annotations

import gc
import pathlib
import tarfile
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.metrics import average_precision, hit_rate, mean_average_precision, top_k, top_k_accuracy
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.suite import DATASETS
from tclip_jax.evaluation.tasks import source_task, suite_tasks
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

pytestmark = [
    pytest.mark.torch,
    # webdataset leaves files open; `gc.collect` below reports them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHAPE = CLIPConfig(
    16,
    VisionConfig((16, 16), patch_size=8, width=32, layers=1, head_width=16),
    TextConfig(context_length=24, width=16, heads=2, layers=1),
)
IMAGES = 26


class Theirs:
    """The exported model, loaded and evaluated by CLIP_benchmark in float32."""

    def __init__(self, folder: pathlib.Path) -> None:
        import open_clip
        import torch
        from clip_benchmark.metrics import zeroshot_classification

        torch.set_num_threads(1)  # threads only slow down tiny matrix products
        name = f"local-dir:{folder}"
        self.model, _, self.transform = open_clip.create_model_and_transforms(name)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.model.eval()
        # accuracy() of CLIP_benchmark calls float on an array (1,), which NumPy 2.4 refuses.
        zeroshot_classification.float = lambda x: x.item() if isinstance(x, np.ndarray) else float(x)

    def __call__(self, dataset: str, folder: pathlib.Path, batch_size: int = 7) -> dict[str, float]:
        import torch
        from clip_benchmark.datasets.builder import build_dataset, get_dataset_default_task
        from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

        task = get_dataset_default_task(dataset)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = build_dataset(f"wds/{dataset}", str(folder), self.transform, "test", task=task)
            loader = torch.utils.data.DataLoader(data.batched(batch_size), batch_size=None, num_workers=0)
            if task == "zeroshot_retrieval":
                metrics = zeroshot_retrieval.evaluate(
                    self.model, loader, self.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
                )
            else:
                metrics = zeroshot_classification.evaluate(
                    self.model, loader, self.tokenizer, data.classes, data.templates, "cpu", amp=False
                )
        return metrics


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Encoder, Theirs]]:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), param_shapes(SHAPE))
    folder = tmp_path_factory.mktemp("model") / "export"
    preprocess = Preprocess(16)
    export_model(folder, config=SHAPE, preprocess=preprocess, params=params)
    yield Encoder(Model(SHAPE, preprocess, params), batch_size=16), Theirs(folder)
    gc.collect()


def targets_of(name: str) -> list[Any]:
    row, rng = DATASETS[name], np.random.default_rng(len(name))
    if row.kind == "retrieval":
        return [[f"picture {i} of a {word}" for word in ("cat", "dog", "frog")[: 1 + i % 3]] for i in range(IMAGES)]
    if row.kind == "multilabel":
        return [*rng.integers(0, 2, (IMAGES, row.classes))]
    return [int(label) for label in rng.integers(0, row.classes, IMAGES)]


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_the_metrics_of_clip_benchmark(
    name: str, both: tuple[Encoder, Theirs], exports: types.SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    row = DATASETS[name]
    suffix = ("webp", "png", "jpg")[len(name) % 3]
    templates = exports.TEMPLATES[: 1 if row.classes > 150 else 3]
    # As in closest_object_distance, one class name is empty.
    names = [f"thing {i}" if i != 3 else "" for i in range(row.classes)]
    folder = exports.write(tmp_path / row.folder, targets_of(name), names, templates, suffix=suffix)
    ours = evaluate(both[0], suite_tasks(tmp_path, name), model="m").results[name]
    theirs = both[1](name, folder)
    assert ours.metrics == pytest.approx(theirs, abs=1e-6, nan_ok=True) and ours.samples == IMAGES
    assert np.isnan(ours.metrics.get("acc5", 0)) == (0 < row.classes < 5)
    assert row.main_metric in ours.metrics and row.averaged in ours.metrics


def test_one_export_is_scored_with_its_own_templates(
    both: tuple[Encoder, Theirs], exports: types.SimpleNamespace, tmp_path: pathlib.Path
) -> None:
    """A single source, a suite and CLIP_benchmark give the same metrics; other templates give different ones."""
    names, labels = [f"thing {i}" for i in range(10)], targets_of("mnist")
    folder = exports.write(tmp_path / "wds_mnist", labels, names, ("a bad drawing of {c}, 1874", "the {c}'s shadow"))
    theirs = both[1]("mnist", folder)
    single = evaluate(both[0], [source_task(f"wds:{folder}")], model="m").results["wds_mnist"]
    row = evaluate(both[0], suite_tasks(tmp_path, "mnist"), model="m").results["mnist"]
    simple = evaluate(both[0], [source_task(f"wds:{folder}", "test", "simple")], model="m").results["wds_mnist"]
    assert single.metrics == row.metrics == pytest.approx(theirs, abs=1e-6)
    assert simple.metrics != single.metrics


def test_metrics_equal_on_the_same_arrays(both: tuple[Encoder, Theirs]) -> None:
    import torch
    from clip_benchmark.metrics import zeroshot_classification as theirs
    from sklearn.metrics import balanced_accuracy_score

    from tclip_jax.evaluation.metrics import mean_per_class_recall

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 30)).astype(np.float32)
    labels = rng.integers(3, 27, 500)  # some classes do not occur
    expected = theirs.accuracy(torch.from_numpy(logits), torch.from_numpy(labels), (1, 5))
    assert [top_k_accuracy(logits, labels, k) for k in (1, 5)] == pytest.approx(expected, abs=1e-6)
    assert [hit_rate(top_k(logits, 5)[:, :k], labels) for k in (1, 5)] == pytest.approx(expected, abs=1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        recall = balanced_accuracy_score(labels, logits.argmax(1))
    assert mean_per_class_recall(logits.argmax(1), labels) == pytest.approx(recall, abs=1e-6)

    targets = rng.integers(0, 2, (500, 30)) * (np.arange(30) != 4)  # one class has no positive
    precision = theirs.average_precision_per_class(torch.from_numpy(logits), torch.from_numpy(targets))
    np.testing.assert_allclose(average_precision(logits, targets), precision.numpy(), atol=1e-6)
    assert mean_average_precision(logits, targets) == pytest.approx(float(precision.mean()), abs=1e-6)
    assert precision[4] == 0


@pytest.mark.slow
@pytest.mark.shared_data
def test_cifar10_agrees_to_the_last_image(
    both: tuple[Encoder, Theirs], exports: types.SimpleNamespace, tmp_path: pathlib.Path, shared_data: pathlib.Path
) -> None:
    files, labels = {}, []
    with tarfile.open(shared_data / "cifar10" / "cifar10_jpg.tar.xz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("test/"):
                files[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    classes = sorted({name.split("/")[1] for name in files})
    order = sorted(files, key=lambda name: name.rpartition("/")[2])  # mixes the classes
    labels = [classes.index(name.split("/")[1]) for name in order]
    folder = exports.write(
        tmp_path / "wds_vtab-cifar10",
        labels,
        classes,
        suffix="jpg",
        images=dict(enumerate(files[name] for name in order)),
    )
    report = evaluate(both[0], suite_tasks(tmp_path, "vtab/cifar10"), model="m")
    theirs = both[1]("vtab/cifar10", folder, batch_size=256)
    ours = report.results["vtab/cifar10"]
    assert report.partial == {} and ours.samples == 10_000
    assert round(ours.metrics["acc1"] * 10_000) == round(theirs["acc1"] * 10_000)
    assert ours.metrics == pytest.approx(theirs, abs=1e-6)
