"""Accuracy of ternary students: `python -m benchmarks.accuracy --out runs/accuracy [--quick] [--json]`.

The images are those of ../shared/data or TCLIP_TEST_DATA. On CIFAR-10 the metric is zero-shot accuracy on the test
images. On emoji it is recall@5 of names, in a drawing style that is not in the training data, for names that are in the
training data and for names that are not. Every variant of configs/accuracy.py is trained with the same seeds and
packed, and the packed model is evaluated. Differences are paired by seed, and compare a variant with the full-precision
student that has the same distillation and learning rates. Intervals are 95 % intervals by Student's t. Finished results
are stored in OUT; rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pathlib
import sys
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from PIL import Image

from configs.accuracy import VARIANTS
from tclip_jax import keys
from tclip_jax.artifacts.inspection import ternary_share, zero_share
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.sources import described, open_source
from tclip_jax.data.sources.content import contents
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.probe import t_interval
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import source_task
from tclip_jax.inference.model import Model
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.config import run_config
from tclip_jax.runs.record import read_metrics, software
from tclip_jax.schema import count, number
from tclip_jax.storage import atomic_folder, write_atomic
from tclip_jax.training.loop import train
from tclip_jax.training.teacher_cache import write_cache

FULL = "full"
IN_THE_STEP = ("hidden", "relations")  # need the teacher in the step, not only its embeddings
METRICS = {
    "cifar10": {"accuracy": ("test", "acc1")},
    "emoji": {"R@5": ("test", "text_retrieval_recall@5"), "R@5 unseen names": ("unseen", "text_retrieval_recall@5")},
}
COPIES = {"cifar10": 4, "emoji": 16}


def lay_out(folder: pathlib.Path, shared: pathlib.Path, data: str, per_class: int) -> None:
    """Extract the images of one data set to `folder` as a `folder:` source, atomically, unless the folder exists.

    Raises:
      ValueError: the existing folder was made from other archives or with other settings.
    """
    archives = sorted((shared / data).glob("*.tar*"))
    made_by = keys.recipe(
        archives={path.name: content for path, content in zip(archives, contents(map(str, archives)), strict=True)},
        per_class=per_class,
    )
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists():
        if differs := keys.difference(json.loads(note.read_text()) if note.exists() else {}, made_by):
            raise ValueError(f"{folder}: it was made from other inputs ({differs}); choose another --out")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(epath.Path(note), json.dumps(made_by, indent=2) + "\n")
    with atomic_folder(folder) as building:
        for name, content in (_cifar10 if data == "cifar10" else _emoji)(shared / data, per_class):
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _cifar10(shared: pathlib.Path, per_class: int) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes) of the first images of each class: `train/<class>/<nnnn>.jpg` and `test/…`."""
    for name, content in _members(shared / "cifar10_jpg.tar.xz"):
        split, classname, file = ("", "", *pathlib.PurePosixPath(name).parts)[-3:]
        if split in ("train", "test") and int(pathlib.PurePosixPath(file).stem) < per_class:
            yield f"{split}/{classname}/{file}", content


def _emoji(shared: pathlib.Path, per_class: int) -> Iterator[tuple[str, bytes]]:
    """Yield (path, bytes): `train` in one drawing style; in the other, `test` with the same names and `unseen`."""
    for shard in ("noto", "blob"):
        files: dict[str, dict[str, bytes]] = {}
        for name, content in _members(shared / f"{shard}.tar"):
            stem, _, kind = pathlib.PurePosixPath(name).name.partition(".")
            files.setdefault(stem, {})[kind] = content
        for stem, each in sorted(files.items()):
            trained = hashlib.sha256(each["txt"].strip()).digest()[0] % 2 == 0
            split = {("noto", True): "train", ("blob", True): "test", ("blob", False): "unseen"}.get((shard, trained))
            if split and (per_class > 100 or hashlib.sha256(stem.encode()).digest()[1] < 64):
                yield f"{split}/{stem}.png", _on_white(each["png"])
                yield f"{split}/{stem}.txt", each["txt"]


def _members(archive: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file:
                yield member.name, file.read()


def _on_white(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as picture:
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    buffer = io.BytesIO()
    flat.save(buffer, format="png")
    return buffer.getvalue()


def recipe(args: argparse.Namespace, data: str, who: str, distilled: bool) -> Any:
    """Return the configuration of a variant on the extracted data."""
    modes = ("" if distilled else ",plain") + (",runlocal" if args.quick else "")
    config = load_recipe(f"accuracy:{data},{who}{modes}")
    config.data.source = f"folder:{args.out}/data/{data}"
    config.eval.source = ""  # the packed model is evaluated instead, at the end
    if who == "average":
        splits = {split for split, _ in METRICS[data].values()}
        shared = {"source": config.data.source, "templates": config.data.templates, "every": 10**9}
        config.evals = tuple(shared | {"split": split, "name": split} for split in sorted(splits))
    if args.width:
        config.model.vision_cfg.width = config.model.text_cfg.width = config.model.embed_dim = args.width
        config.model.text_cfg.heads = max(args.width // 64, 2)
    if args.steps:
        config.optimizer.warmup_steps = config.optimizer.warmup_steps * args.steps // config.steps
        config.optimizer.recovery_steps = config.optimizer.recovery_steps * args.steps // config.steps
        config.ternary_warmup_steps = config.ternary_warmup_steps * args.steps // config.steps
        config.steps = args.steps
    return config


def place(args: argparse.Namespace, data: str) -> pathlib.Path:
    """Return the folder of the runs of one data set and size."""
    sizes = "".join(f"-{name}{value}" for name, value in (("width", args.width), ("steps", args.steps)) if value)
    return pathlib.Path(args.out) / f"{data}{sizes}"


def prepare_teacher(args: argparse.Namespace, data: str) -> None:
    """Train the teacher of one data set and cache its embeddings."""
    folder, config = place(args, data), recipe(args, data, "teacher", True)
    config.steps = config.steps if args.quick else 2 * config.steps
    train(config, folder / "teacher")
    run = run_config(recipe(args, data, FULL, False))
    write_cache(folder / "cache", run, str(folder / "teacher"), copies=1 if args.quick else COPIES[data])


def experiment(args: argparse.Namespace, data: str, who: str, distilled: bool, seed: int) -> dict[str, float]:
    """Return the metrics of one variant and seed: train and evaluate it, or read the stored result.

    Raises:
      ValueError: the stored result was made from other inputs.
    """
    folder = place(args, data)
    name = f"{who}-{'distilled' if distilled else 'plain'}-{seed}"
    path = folder / "results" / f"{name}.json"
    config = recipe(args, data, who, distilled)
    config.seed = seed
    if distilled and who in IN_THE_STEP:
        config.teacher = str(folder / "teacher")
    elif distilled:
        config.data.teacher_cache = str(folder / "cache")
    made_by = _made_by(config, data, folder if distilled else None)
    if path.exists():
        stored = json.loads(path.read_text())
        if differs := keys.difference(stored.get("made_by", {}), made_by):
            raise ValueError(f"{path}: this result was made from other inputs ({differs}); choose another --out")
        return stored["result"]
    model = train(config, folder / "runs" / name)
    params = pack_params(model.params, model.rules)
    encoder = Encoder(Model(model.config, model.preprocess, params), batch_size=256)
    result = {
        "share": ternary_share(params),
        "share without embedding": ternary_share(params, token_embedding=False),
        "zeros": zero_share(params),
        "zeros without embedding": zero_share(params, token_embedding=False),
    }
    for metric, (split, measured) in METRICS[data].items():
        task = source_task(config.data.source, split, config.data.templates)
        report = evaluate(encoder, [task], model="")
        if report.errors:
            raise ValueError(f"{name}: {next(iter(report.errors.values()))}")
        result[metric] = next(iter(report.results.values())).metrics[measured]
        if who == "average":
            result[metric] = _of_average(folder / "runs" / name, split, measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(epath.Path(path), json.dumps({"made_by": made_by, "result": result}, indent=2) + "\n")
    return result


def _made_by(config: Any, data: str, taught_in: pathlib.Path | None) -> keys.Recipe:
    """Return the inputs that determine a result: configuration, images, teacher, version; without their paths."""
    paths = {"data.source": "", "data.teacher_cache": "", "teacher": "", "evals": ()}
    resolved = config.copy_and_resolve_references()
    resolved.update_from_flattened_dict(paths)
    splits = sorted({"train", *(split for split, _ in METRICS[data].values())})
    return keys.recipe(
        config=json.loads(resolved.to_json()),
        data={split: described(open_source(config.data.source, split)) for split in splits},
        teacher=TeacherCache.open(taught_in / "cache").made_by if taught_in else None,
        version=software()["tclip_jax"],
    )


def _of_average(workdir: pathlib.Path, split: str, measured: str) -> float:
    """Return the metric of the ternarized average of the weights, which the run evaluated at its end."""
    lines = [
        {name: value for name, value in line.items() if name.startswith(f"{split}/")} for line in read_metrics(workdir)
    ]
    return next(value for line in lines for name, value in line.items() if name.endswith(f"{measured}_of_average"))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half-width of the 95 % interval by Student's t; NaN for a single value."""
    low, high = t_interval(values)
    return float(np.mean(values)), (high - low) / 2


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as an aligned table, fractions in per cent."""
    heads = ("data", "variant", "metric", "seeds", "mean", "± 95 %", "to full", "± 95 %")
    lines = [[*heads, "ternary", "(no emb.)", "zeros", "(no emb.)"]]
    for row in rows:
        numbers = (
            row["mean"], row["half"], row["difference"], row["difference_half"], row["share"],
            row["share without embedding"], row["zeros"], row["zeros without embedding"],
        )  # fmt: skip
        shown = ["" if math.isnan(number) else f"{100 * number:.2f}" for number in numbers]
        lines.append([row["data"], row["variant"], row["metric"], str(row["seeds"]), *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def reference(who: str) -> str:
    """Return the full-precision variant with the same learning rates, which a variant is compared with."""
    return f"{FULL}_{who}" if f"{FULL}_{who}" in VARIANTS else FULL


def summarize(data: str, who: str, distilled: bool, results: Any) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric of a variant. `results` has the results of every variant, one per seed."""
    variant, full = results[who, distilled], results.get((reference(who), distilled), [])
    for metric in METRICS[data]:
        mean, half = interval([each[metric] for each in variant])
        pairs = [a[metric] - b[metric] for a, b in zip(variant, full, strict=False)]
        difference, difference_half = interval(pairs) if pairs and not who.startswith(FULL) else (math.nan, math.nan)
        names = [name for name in variant[0] if name not in METRICS[data]]
        shares = {name: float(np.mean([each[name] for each in variant])) for name in names}
        yield {
            "data": data,
            "variant": who if distilled else f"{who}, plain",
            "metric": metric,
            "seeds": len(variant),
            "mean": mean,
            "half": half,
            "difference": difference,
            "difference_half": difference_half,
            **shares,
        }


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Plot the differences from full precision in points, with 95 % intervals; one plot per metric."""
    compared = [row for row in rows if not math.isnan(row["difference"])]
    groups = list(dict.fromkeys((row["data"], row["metric"]) for row in compared))
    most = max(sum((row["data"], row["metric"]) == group for row in compared) for group in groups)
    figure = Figure(figsize=(4.2 * len(groups), 1.2 + 0.28 * most), layout="constrained")
    for axes, (data, metric) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        group = [row for row in compared if (row["data"], row["metric"]) == (data, metric)]
        points, halves = ([100 * row[name] for row in group] for name in ("difference", "difference_half"))
        axes.errorbar(points, [row["variant"] for row in group], xerr=halves, fmt="o", color="#d1603d", capsize=3)
        axes.axvline(0, color="#9aa5b1")
        axes.set_title(f"{data}, {metric}", fontsize=10)
        axes.set_xlabel("points to full precision")
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
    return figure


def measured(args: argparse.Namespace, shared: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of the table; raise ValueError if a file in OUT was made from other inputs."""
    rows = []
    for data in args.data:
        lay_out(pathlib.Path(args.out) / "data" / data, shared, data, 20 if args.quick else 10**6)
        prepare_teacher(args, data)
        results: dict[tuple[str, bool], list[dict[str, float]]] = {}
        for seed in range(args.seeds):
            for who, distilled in [*((who, True) for who in args.variants), *((who, False) for who in args.plain)]:
                result = experiment(args, data, who, distilled, seed)
                results.setdefault((who, distilled), []).append(result)
                figures = ", ".join(f"{metric} {result[metric]:.2%}" for metric in METRICS[data])
                print(f"{data} seed {seed} {who}{'' if distilled else ', plain'}: {figures}", flush=True)
        rows += [row for who, distilled in results for row in summarize(data, who, distilled, results)]
    return rows


def main() -> int:
    """Print a line after each experiment, then the table, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/accuracy", metavar="DIR", help="data, runs and results")
    parser.add_argument("--data", nargs="+", choices=METRICS, default=list(METRICS), help="data sets (default: both)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--plain", nargs="*", choices=VARIANTS, default=[FULL, "ternaryclip"], help="students trained without a teacher"
    )
    parser.add_argument("--seeds", type=count, default=5, metavar="N", help="number of seeds (default 5)")
    parser.add_argument(
        "--steps", type=number(int, ge=0), default=0, metavar="N", help="training steps (default: the recipe's)"
    )
    parser.add_argument(
        "--width", type=number(int, ge=0), default=0, metavar="N", help="width of the models (default: the recipe's)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="plot the differences and their intervals to a file: .svg, .png, ..."
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, two variants, four steps; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    if args.quick:
        args.out, args.data, args.seeds = f"{args.out}-quick", ["emoji"], 1
        args.variants, args.plain = [FULL, "average"], []
    shared = pathlib.Path(os.environ.get("TCLIP_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not shared.is_dir():
        print(f"{shared}: this folder of test images does not exist; set TCLIP_TEST_DATA", file=sys.stderr)
        return 2
    try:
        rows = measured(args, shared)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    if args.plot:
        picture(rows).savefig(args.plot, metadata={"Date": None} if args.plot.endswith(".svg") else None)
    if args.json:
        clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"rows": clean}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
