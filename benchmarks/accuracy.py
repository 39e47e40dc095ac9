"""Accuracy of ternary students: `python -m benchmarks.accuracy --out runs/accuracy [--quick] [--json]`.

The images are those of ../shared/data or TCLIP_TEST_DATA. On CIFAR-10 the metric is zero-shot accuracy on the test
images, with --choose on held-out training images. On emoji it is recall@5 of names, in a drawing style that is not in
the training data, for names that are in the training data and for names that are not. Every variant of
configs/accuracy.py is trained with the same seeds and packed, and the packed model is evaluated. Differences are paired
by seed, and compare a variant with the full-precision student that has the same distillation, methods and learning
rates. With --siglip all models, teachers too, are SigLIPs of one shape, trained with the sigmoid loss. Intervals are
95 % intervals by Student's t. Finished results are stored in OUT, and in the JSON file of --results, which may be that
of the repository. Neither is repeated; rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from benchmarks.accuracy_data import lay_out, write_tokenizer
from benchmarks.accuracy_results import FULL, METRICS, Kept, picture, sizes_of, summarize, table
from configs.accuracy import QUANTIZERS, changes_of, full_precision_of
from tclip_jax import keys
from tclip_jax.artifacts.inspection import ternary_share, zero_share
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.data.sources import described, open_source
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import source_task
from tclip_jax.inference.model import Model
from tclip_jax.recipes import load_recipe
from tclip_jax.runs.config import base_config, run_config
from tclip_jax.runs.record import read_metrics, software
from tclip_jax.schema import number
from tclip_jax.storage import write_atomic
from tclip_jax.training.loop import train
from tclip_jax.training.teacher_cache import write_cache

IN_THE_STEP = {"hidden", "relations", "in_step", "int8_teacher"}  # the teacher runs in the step, without a cache
COPIES = {"cifar10": 4, "cifar10_words": 4, "emoji": 16}
MODES = {"siglip": "siglip", "runlocal": "quick"}  # of the recipe, by their options
STEPS = ("optimizer.warmup_steps", "optimizer.recovery_steps", "ternary_warmup_steps", "ternary_anneal_steps", "steps")


def recipe(args: argparse.Namespace, data: str, who: str, distilled: bool) -> Any:
    """Return the configuration of a variant on the extracted data."""
    modes = "".join(f",{mode}" for mode in ("siglip", "runlocal") if getattr(args, MODES[mode]))
    modes += "" if distilled else ",plain"
    config = load_recipe(f"accuracy:{data},{who}{modes}")
    config.data.source = f"folder:{images(args, data)}"
    if config.data.tokenizer:
        config.data.tokenizer = str(tokenizer_of(args))
    config.eval.source = ""  # the packed model is evaluated instead, at the end
    if "average" in who.split("+"):
        splits = {split for split, _ in METRICS[data].values()}
        shared = {"source": config.data.source, "templates": config.data.templates, "every": 10**9}
        config.evals = tuple(shared | {"split": split, "name": split} for split in sorted(splits))
    if args.width:
        config.model.vision_cfg.width = config.model.text_cfg.width = config.model.embed_dim = args.width
        config.model.text_cfg.heads = max(args.width // 64, 2)
    if args.steps:
        times = args.steps / load_recipe(f"accuracy:{data},teacher{modes}").steps
        values = config.to_dict() | {f"optimizer.{key}": value for key, value in config.optimizer.items()}
        config.update_from_flattened_dict({key: round(values[key] * times) for key in STEPS})
    return config


def images(args: argparse.Namespace, data: str) -> pathlib.Path:
    """Return the folder of the images of one data set."""
    return pathlib.Path(args.out) / "data" / f"{data.removesuffix('_words')}{'-choose' if args.choose else ''}"


def tokenizer_of(args: argparse.Namespace) -> pathlib.Path:
    """Return the folder of the tokenizer of cifar10_words."""
    return pathlib.Path(args.out) / "data" / "words"


def place(args: argparse.Namespace, data: str) -> pathlib.Path:
    """Return the folder of the runs of one data set and size."""
    sizes = "".join(f"-{name}{value}" for name, value in (("width", args.width), ("steps", args.steps)) if value)
    modes = "".join(f"-{name}" for name in ("siglip", "choose") if getattr(args, name))
    return pathlib.Path(args.out) / f"{data}{modes}{sizes}"


def teacher_recipe(args: argparse.Namespace, data: str) -> Any:
    """Return the configuration of the teacher, which is trained twice as long."""
    config = recipe(args, data, "teacher", True)
    config.steps = config.steps if args.quick else 2 * config.steps
    return config


def prepare_teacher(args: argparse.Namespace, data: str) -> None:
    """Train the teacher of one data set and cache its embeddings."""
    folder = place(args, data)
    train(teacher_recipe(args, data), folder / "teacher")
    run = run_config(recipe(args, data, FULL, False))
    write_cache(folder / "cache", run, str(folder / "teacher"), copies=_copies(args, data))


def experiment(
    args: argparse.Namespace, data: str, who: str, distilled: bool, seed: int, kept: Kept | None = None
) -> dict[str, Any]:
    """Return the metrics of one variant and seed: a kept or stored result, or train and evaluate it.

    A run that does not converge has {"failed": its error}. "cpu_seconds" is the CPU time of training, with that of
    pretraining; None if a part of it was trained before.

    Raises:
      ValueError: the stored result was made from other inputs.
    """
    config = recipe(args, data, who, distilled)
    config.seed = seed
    teacher = teacher_recipe(args, data) if distilled or config.init == "teacher" else None
    made_by: dict[str, Any] = {
        "config": keys.digest(_changed(config)),
        "teacher": keys.digest(_changed(teacher)) if teacher else None,
        "data": keys.digest(_contents(config, data)),
        "version": software()["tclip_jax"],
    }
    made_by |= _of_teacher(args, data, who, distilled)
    if config.init == FULL:
        made_by["pretraining"] = keys.digest(_changed(_pretraining(args, data, who, distilled, seed)))
    result = kept.find(made_by) if kept else None
    if result is None:
        result = _measured(args, data, who, distilled, config)
        if kept:
            steps = args.steps or load_recipe(f"accuracy:{data},teacher").steps
            sizes: dict[str, Any] = {"width": config.model.vision_cfg.width, "steps": steps}
            which = {"data": data, "split": "choose" if args.choose else "test", "variant": who}
            which |= sizes | {"seed": seed, "distilled": distilled, "siglip": args.siglip}
            kept.add(which | {"commit": software().get("commit")}, made_by, result)
    return result


def _measured(args: argparse.Namespace, data: str, who: str, distilled: bool, config: Any) -> dict[str, Any]:
    prepare_teacher(args, data)
    folder = place(args, data)
    name = f"{who}-{'distilled' if distilled else 'plain'}-{config.seed}"
    path, workdir = folder / "results" / f"{name}.json", folder / "runs" / name
    pretraining = _pretraining(args, data, who, distilled, config.seed) if config.init == FULL else None
    made_by = keys.recipe(
        config=_without_paths(config),
        data=_contents(config, data),
        teacher=TeacherCache.open(folder / "cache").made_by if distilled else None,
        version=software()["tclip_jax"],
        **_of_teacher(args, data, who, distilled),
        **({"pretraining": _without_paths(pretraining)} if pretraining else {}),
    )
    if path.exists():
        stored = json.loads(path.read_text())
        if differs := keys.difference(stored.get("made_by", {}), made_by):
            raise ValueError(f"{path}: this result was made from other inputs ({differs}); choose another --out")
        return stored["result"]
    _set_teacher(config, folder, who, distilled)
    result: dict[str, Any]
    resumed, started = workdir.exists(), time.process_time()
    try:
        if pretraining:
            before = folder / "runs" / f"{_pretrained_of(who)}-{'distilled' if distilled else 'plain'}-{config.seed}"
            resumed, config.init = resumed or before.exists(), str(before)
            train(pretraining, before)
        elif config.init:
            config.init = str(folder / "teacher")
        model = train(config, workdir)
        seconds = None if resumed else round(time.process_time() - started)
        average = "average" in who.split("+")
        result = evaluated(model, config, data, workdir, average=average) | {"cpu_seconds": seconds}
    except ValueError as error:
        if "skipped steps in a row" not in str(error):
            raise
        result = {"failed": str(error)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(epath.Path(path), json.dumps({"made_by": made_by, "result": result}, indent=2) + "\n")
    return result


def _in_the_step(who: str) -> bool:
    """Whether the teacher of a distilled variant runs in the step."""
    return bool(IN_THE_STEP & {*who.split("+")})


def _set_teacher(config: Any, folder: pathlib.Path, who: str, distilled: bool) -> None:
    """Set the teacher of a distilled student: the model in the step, or its cached embeddings."""
    if distilled and _in_the_step(who):
        config.teacher = str(folder / "teacher")
    elif distilled:
        config.data.teacher_cache = str(folder / "cache")


def _copies(args: argparse.Namespace, data: str) -> int:
    """The augmented copies of each image in the teacher cache."""
    return 1 if args.quick else COPIES[data]


def _of_teacher(args: argparse.Namespace, data: str, who: str, distilled: bool) -> dict[str, Any]:
    """Say how a student uses its teacher: a part of what made a result; {} without one."""
    if not distilled:
        return {}
    return {"in_the_step": True} if _in_the_step(who) else {"copies": _copies(args, data)}


def _pretrained_of(who: str) -> str:
    """Return the full-precision variant with the same methods that a `pretrained` one starts from."""
    return "+".join(method for method in full_precision_of(who).split("+") if method != "pretrained")


def _pretraining(args: argparse.Namespace, data: str, who: str, distilled: bool, seed: int) -> Any:
    """Return the configuration of the run that a `pretrained` variant starts from."""
    config = recipe(args, data, _pretrained_of(who), distilled)
    config.seed = seed
    _set_teacher(config, place(args, data), who, distilled)
    return config


def evaluated(model: Model, config: Any, data: str, workdir: pathlib.Path, *, average: bool) -> dict[str, float]:
    """Return shares, sizes and metrics of a trained model, packed; with `average`, the metrics of the averaged weights.

    Raises:
      ValueError: the model cannot be evaluated.
    """
    params = pack_params(model.params, model.rules)
    encoder = Encoder(dataclasses.replace(model, params=params, rules=()), batch_size=256)
    result = {
        "share": ternary_share(params),
        "share without embedding": ternary_share(params, token_embedding=False),
        "zeros": zero_share(params),
        "zeros without embedding": zero_share(params, token_embedding=False),
        **sizes_of(params),
    }
    for metric, (split, measured) in METRICS[data].items():
        task = source_task(config.data.source, split, config.data.templates)
        report = evaluate(encoder, [task], model="")
        if report.errors:
            raise ValueError(f"{workdir.name}: {next(iter(report.errors.values()))}")
        result[metric] = next(iter(report.results.values())).metrics[measured]
        if average:
            result[metric] = _of_average(workdir, split, measured)
    return result


def _without_paths(config: Any) -> dict[str, Any]:
    """A configuration as JSON, without paths of data, teacher and initial weights, whose contents or recipes count."""
    paths = {"data.source": "", "data.tokenizer": "", "data.teacher_cache": "", "teacher": "", "evals": ()}
    resolved = config.copy_and_resolve_references()
    resolved.update_from_flattened_dict(paths)
    return json.loads(resolved.to_json())


def _changed(config: Any) -> dict[str, Any]:
    """The values of a configuration that are not defaults, so that a new key changes no digest of kept results.

    A default that changes needs a new version, which is part of what made a result.
    """
    defaults = flatten_dict(json.loads(base_config().to_json()), sep=".")
    values = flatten_dict(_without_paths(config), sep=".")
    return {name: value for name, value in values.items() if name not in defaults or defaults[name] != value}


def _contents(config: Any, data: str) -> Mapping[str, Any]:
    splits = sorted({"train", *(split for split, _ in METRICS[data].values())})
    return {split: described(open_source(config.data.source, split)) for split in splits}


def _of_average(workdir: pathlib.Path, split: str, measured: str) -> float:
    """Return the metric of the ternarized average of the weights, which the run evaluated at its end."""
    lines = [
        {name: value for name, value in line.items() if name.startswith(f"{split}/")} for line in read_metrics(workdir)
    ]
    return next(value for line in lines for name, value in line.items() if name.endswith(f"{measured}_of_average"))


def measured(args: argparse.Namespace, shared: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows of the table; raise ValueError if a file in OUT was made from other inputs."""
    rows = []
    kept = Kept(pathlib.Path(args.results)) if args.results else None
    for data in args.data:
        lay_out(images(args, data), shared, data, 20 if args.quick else 10**6, choose=args.choose)
        if data == "cifar10_words":
            write_tokenizer(tokenizer_of(args))
        results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for seed in args.seeds:
            for who, distilled in [*((who, True) for who in args.variants), *((who, False) for who in args.plain)]:
                result = experiment(args, data, who, distilled, seed, kept)
                figures = ", ".join(f"{metric} {result[metric]:.2%}" for metric in METRICS[data] if metric in result)
                name = f"{data} seed {seed} {who}{'' if distilled else ', plain'}"
                print(f"{name}: {figures or result['failed']}", flush=True)
                results.setdefault((who, distilled), []).append(result)
        whole = {key: each for key, each in results.items() if not any("failed" in result for result in each)}
        rows += [row for who, distilled in whole for row in summarize(data, who, distilled, whole, args.against)]
    return rows


def seeds(text: str) -> list[int]:
    """Parse "5", the seeds 0 to 4, or "10-19"."""
    first, dash, last = text.partition("-")
    try:
        chosen = list(range(int(first), int(last) + 1)) if dash else list(range(int(first)))
    except ValueError:
        chosen = []
    if not chosen:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of seeds: write 5 for the seeds 0 to 4, or 10-19")
    return chosen


def variant(text: str) -> str:
    """Parse QUANTIZER[+METHOD...]."""
    try:
        changes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main() -> int:
    """Print a line after each experiment, then the table, and with --json one object last."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="runs/accuracy", metavar="DIR", help="data, runs and results")
    parser.add_argument(
        "--results", metavar="FILE", help="JSON file that keeps the results, as benchmarks/results/accuracy.json"
    )
    parser.add_argument(
        "--data", nargs="+", choices=METRICS, default=["cifar10", "emoji"], help="default: cifar10 emoji"
    )
    parser.add_argument("--variants", nargs="+", type=variant, metavar="NAME", help="such as ternaryclip+soft+x4")
    parser.add_argument(
        "--plain", nargs="*", type=variant, default=[], metavar="NAME", help="students trained without a teacher"
    )
    parser.add_argument("--siglip", action="store_true", help="SigLIPs with the sigmoid loss")
    parser.add_argument(
        "--choose", action="store_true", help="evaluate on training images of CIFAR-10 that are held out from training"
    )
    parser.add_argument(
        "--against", type=variant, default=FULL, metavar="NAME", help="what is compared with (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=seeds, default=seeds("5"), metavar="N", help="number of seeds, or a range as 10-19 (default 5)"
    )
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
    if not args.variants:
        args.variants = list(QUANTIZERS)
    if args.quick:
        args.out, args.data, args.seeds = f"{args.out}-quick", ["emoji"], [0]
        args.variants, args.plain, args.choose = [FULL, "ternaryclip+average"], [], False
    if args.choose and "emoji" in args.data:
        parser.error("--choose has held-out images only of CIFAR-10: add --data cifar10")
    if args.against not in (FULL, *args.variants):
        parser.error(f"--against {args.against} is not one of --variants {' '.join(args.variants)}")
    shared = pathlib.Path(os.environ.get("TCLIP_TEST_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
    if not shared.is_dir():
        print(f"{shared}: this folder of test images does not exist; set TCLIP_TEST_DATA", file=sys.stderr)
        return 2
    try:
        rows = measured(args, shared)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows, args.against))
    if args.plot and all(math.isnan(row["difference"]) for row in rows):
        print(f"{args.plot}: not written, because there is no difference to {args.against} to plot", file=sys.stderr)
    elif args.plot:
        picture(rows, args.against).savefig(args.plot, metadata={"Date": None} if args.plot.endswith(".svg") else None)
    if args.json:
        clean = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps({"rows": clean}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
