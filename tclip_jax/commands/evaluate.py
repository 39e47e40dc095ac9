"""Examples:
  tclip evaluate runs/quickstart/artifact --data digits --split test --templates digits
  tclip evaluate student/ --data exports/ --suite clip-benchmark-41 --out results/student
  tclip evaluate student/ --data birds=folder:/data/cub/images --data wds:/data/flowers --out results/student
  tclip evaluate open_clip/ViT-B-32 --data exports/ --suite imagenet,vtab/cifar10 --download --out results/b32

With --suite, DATA is a folder of webdataset exports (docs/evaluate.md). Otherwise it is a source, whose results are
named NAME, or after its last folder or file. Results that OUT already holds are reused, or refused if their model,
data, templates or options differ.
Exit codes: 0 every image of every data set counts; 1 a data set has no result; 2 an error, nothing is measured; 3 every
data set has a result, but in one some images do not count.
"""

from __future__ import annotations

import argparse

from tclip_jax.commands.classify import add_template_arguments
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the data and the results."""
    parser.add_argument(
        "model", metavar="MODEL", help="workdir of a run, an artifact, or a checkpoint of open_clip or transformers"
    )
    add_data_argument(parser)
    parser.add_argument("--suite", help="clip-benchmark-41, imagenet, vtab, retrieval, or names separated by commas")
    parser.add_argument(
        "--out", metavar="DIR", help="folder of results: a JSON file and the predictions of each data set"
    )
    parser.add_argument("--download", action="store_true", help="download missing exports from the Hugging Face hub")
    parser.add_argument(
        "--tfds", metavar="DIR", help="folder of TensorFlow Datasets, for data sets whose export has no images"
    )
    parser.add_argument("--split", help="split of DATA without --suite (default: test)")
    add_template_arguments(parser, "captions for DATA without --suite, in place of its own")
    parser.add_argument(
        "--batch-size", type=count, default=128, help="images per batch, over all devices (default: 128)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the computation (default: float32)",
    )
    parser.add_argument("--name", help="name of the model in the results (default: MODEL)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write a page with example mistakes; needs --out")


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Add --data, for commands that measure data sets or those of a suite."""
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="[NAME=]DATA",
        help="with --suite a folder of exports, else a source: digits, folder:<path>, tfds:<name>, wds:<folder or"
        " tars>; repeat it for more sources",
    )


def exports_folder(args: argparse.Namespace) -> str:
    """Return the only --data of a suite; raise ValueError if there are several."""
    if len(args.data) > 1:
        raise ValueError(f"--suite takes one folder of exports, but --data is {' and '.join(args.data)}")
    return args.data[0]


def run(args: argparse.Namespace) -> int:
    """Print the metrics of each data set."""
    import jax

    from tclip_jax.data.prompts import parse_templates
    from tclip_jax.data.sources import check_split
    from tclip_jax.evaluation.encoder import Encoder
    from tclip_jax.evaluation.page import report_table, write_page
    from tclip_jax.evaluation.runner import evaluate
    from tclip_jax.evaluation.tasks import SPLIT, named_sources, source_task, suite_tasks
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.model import fingerprint
    from tclip_jax.parallel.distributed import distributed
    from tclip_jax.storage import dump_json

    if args.html and not args.out:
        raise ValueError("--html needs --out DIR: the page shows the predictions in that folder")
    _check_suite_options(args)
    with distributed():
        first = jax.process_index() == 0
        if args.suite:
            tasks = suite_tasks(exports_folder(args), args.suite, args.download, args.tfds)
        else:
            for _, spec in named_sources(args.data):
                if args.split:
                    check_split(spec, args.split)
            templates = parse_templates(args.templates)
            tasks = [source_task(source, args.split or SPLIT, templates) for source in args.data]
        model, name = load_model(args.model), args.name or args.model
        weights = fingerprint(model, args.model)
        encoder = Encoder(model, batch_size=args.batch_size, dtype=args.dtype)
        report = evaluate(encoder, tasks, model=name, weights=weights, out=args.out)
        if report.errors and len(tasks) == 1 and not args.suite:
            raise ValueError(*report.errors.values())
        if args.html and first:
            write_page(args.html, report, args.out, tasks)
        if first and args.json:
            print(dump_json(report.summary(name, weights, args.dtype), indent=None), end="")
        elif first:
            print(report_table(report))
    return 1 if report.errors else 3 if report.partial else 0


def _check_suite_options(args: argparse.Namespace) -> None:
    """Raise ValueError for an option that has no effect with --suite, or without it."""
    names = ("split", "templates") if args.suite else ("download", "tfds")
    for name in names:
        if getattr(args, name) and args.suite:
            raise ValueError(f"--{name} is for sources: with --suite, the exports define splits and templates")
        if getattr(args, name):
            raise ValueError(f"--{name} is for exports: it needs --suite")
