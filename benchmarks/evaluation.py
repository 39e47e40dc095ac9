"""Speed of `tclip evaluate` against CLIP_benchmark: `python -m benchmarks.evaluation [--quick] [--json]`.

Both evaluate the same exported random model on the same webdataset export and cores, alternately, in float32: tclip_jax
in JAX, and the functions of CLIP_benchmark with open_clip in PyTorch. The images are CIFAR-10's test images if
../shared/data has them, else noise. Each run is a whole evaluation with class embeddings. JAX compiles before the first
run; the compile time is printed. Exits with 1 if JAX is slower. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import builtins
import gc
import importlib
import io
import json
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from tclip_jax.data.images import Preprocess
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import source_task
from tclip_jax.inference.load import load_model
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.numerics.torch_side import import_torch

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = tuple(f"a {kind} photo of {a} {{c}}." for kind in ("good", "bad", "blurry", "small", "big", "low contrast",
    "black and white", "cropped", "bright") for a in ("a", "the"))  # fmt: skip
SHARDS = 2


def samples(images: int) -> list[tuple[bytes, int]]:
    """Return JPEG files and their labels, with mixed classes."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    archive = pathlib.Path(os.environ.get("TCLIP_TEST_DATA", beside)) / "cifar10" / "cifar10_jpg.tar.xz"
    if not archive.exists():
        rng = np.random.default_rng(0)
        noise = []
        for i in range(images):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "jpeg")
            noise.append((buffer.getvalue(), i % len(CLASSES)))
        return noise
    per_class = -(-images // len(CLASSES))
    members = {f"test/{name}/{i:04}.jpg": (i, label) for label, name in enumerate(CLASSES) for i in range(per_class)}
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in members:
                files[members[member.name]] = tar.extractfile(member).read()  # type: ignore[union-attr]
            if len(files) == len(members):
                break
    return [(files[key], key[1]) for key in sorted(files)][:images]


def write_export(folder: pathlib.Path, pictures: Sequence[tuple[bytes, int]]) -> None:
    """Write a webdataset export as CLIP_benchmark does."""
    (folder / "test").mkdir(parents=True)
    for shard in range(SHARDS):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            part = range(shard * len(pictures) // SHARDS, (shard + 1) * len(pictures) // SHARDS)
            for i in part:
                image, label = pictures[i]
                for suffix, data in (("jpg", image), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"s{i:07}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "test" / "nshards.txt").write_text(f"{SHARDS}\n")
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


class Theirs:
    """Evaluates an exported model with CLIP_benchmark."""

    def __init__(self, model: pathlib.Path, data: pathlib.Path, batch_size: int, workers: int) -> None:
        import open_clip

        builder = importlib.import_module("clip_benchmark.datasets.builder")
        zeroshot_classification = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
        self._evaluate = zeroshot_classification.evaluate
        # Its accuracy() calls float() on an array (1,), which NumPy 2.4 refuses.
        vars(zeroshot_classification)["float"] = lambda x: x.item() if isinstance(x, np.ndarray) else builtins.float(x)
        vars(zeroshot_classification)["tqdm"] = lambda x: x
        name = f"local-dir:{model}"
        self._model, _, transform = open_clip.create_model_and_transforms(name)
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(name)
        self._data = builder.build_dataset("wds/vtab/cifar10", str(data), transform, "test")
        self._batch_size, self._workers = batch_size, workers

    def __call__(self) -> dict[str, float]:
        loader = import_torch().utils.data.DataLoader(
            self._data.batched(self._batch_size), batch_size=None, num_workers=self._workers
        )
        metrics = self._evaluate(
            self._model, loader, self._tokenizer, self._data.classes, self._data.templates, "cpu", amp=False
        )
        gc.collect()
        return metrics


def measure(preset: str, images: int, batch_size: int, rounds: int, folder: pathlib.Path) -> dict[str, Any]:
    """Run both alternately; return rates, ratios and metrics."""
    config = CLIPConfig.from_open_clip(model_cfg(preset))
    params = init_params(CLIP(config), jax.random.key(0))
    export_model(folder / "model", config=config, preprocess=Preprocess(config.vision.image_size), params=params)
    del params
    write_export(folder / "data", samples(images))
    model: Model = load_model(folder / "model")
    task = source_task(f"wds:{folder / 'data'}", "test", TEMPLATES)

    def ours() -> dict[str, float]:
        report = evaluate(Encoder(model, batch_size=batch_size), [task], model=preset)
        return next(iter(report.results.values())).metrics

    started = time.perf_counter()
    ours()
    first = time.perf_counter() - started
    theirs = {workers: Theirs(folder / "model", folder / "data", batch_size, workers) for workers in (0, SHARDS)}
    runs: dict[str, Callable[[], dict[str, float]]] = {"ours": ours}
    runs |= {f"theirs, {workers} workers": run for workers, run in theirs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    metrics: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            metrics[name] = run()
            seconds[name].append(time.perf_counter() - started)
    # In each round, the faster of CLIP_benchmark with and without workers.
    ratios = [min(rest) / mine for mine, *rest in zip(*seconds.values(), strict=True)]
    return {
        "preset": preset,
        "images": images,
        "batch_size": batch_size,
        "images_per_second": {name: images / statistics.median(each) for name, each in seconds.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "compile_seconds": first - statistics.median(seconds["ours"]),
        "acc1": metrics["ours"]["acc1"],
        "difference": max(
            abs(value - metrics["ours"][key]) for each in metrics.values() for key, value in each.items()
        ),
        "load": os.getloadavg()[0],
    }


def main() -> int:
    """Print a table, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only the preset 'tiny'; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import_torch()
    cases = [("tiny", 1000, 128, 3)] if args.quick else [("tiny", 2000, 128, 5), ("ViT-B-32", 128, 64, 3)]
    figures = []
    for preset, images, batch_size, rounds in cases:
        with tempfile.TemporaryDirectory() as folder:
            figure = measure(preset, images, batch_size, rounds, pathlib.Path(folder))
        figures.append(figure)
        rates = ", ".join(f"{name} {rate:,.1f}" for name, rate in figure["images_per_second"].items())
        ratios = ", ".join(f"{ratio:.2f}" for ratio in figure["ratios"])
        print(f"{preset}, {images:,} images: {rates} images/s; ratio {figure['ratio']:.2f} ({ratios})", flush=True)
        print(f"  compiled in {figure['compile_seconds']:.1f} s, acc1 {figure['acc1']:.4f}, load {figure['load']:.1f}")
    passed = all(figure["ratio"] >= 1 for figure in figures)
    if args.json:
        print(json.dumps({"figures": figures, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
