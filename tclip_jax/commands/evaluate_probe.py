"""Examples:
  tclip evaluate probe runs/quickstart/artifact --data digits --out probes/quickstart
  tclip evaluate probe student/ --data exports/ --suite vtab/cifar10,mnist --shots 1 4 --cache features --out probes

Results are in OUT/linear_probe and OUT/<k>_shot, folders for `tclip evaluate compare`; results that OUT already holds
are reused. The exit code is 0 if every data set has a result, 1 if one has none, 2 after an error.
"""

from __future__ import annotations

import argparse
import dataclasses

from tclip_jax.commands.evaluate import add_data_argument, exports_folder
from tclip_jax.schema import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model, the data, the probes and the results."""
    parser.add_argument(
        "model", metavar="MODEL", help="workdir of a run, an artifact, or a checkpoint of another library"
    )
    add_data_argument(parser)
    parser.add_argument(
        "--suite", help="names of data sets and suites, separated by commas; each with splits train and test"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument("--cache", metavar="DIR", help="folder of embeddings, which later calls reuse")
    parser.add_argument("--download", action="store_true", help="download missing splits from the Hugging Face hub")
    parser.add_argument(
        "--linear",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit a linear probe on the whole training set (default: yes)",
    )
    parser.add_argument(
        "--shots",
        type=count,
        nargs="*",
        default=[1, 2, 4, 8, 16],
        metavar="K",
        help="training images per class of few-shot probes (default: 1 2 4 8 16)",
    )
    parser.add_argument("--seeds", type=count, help="random draws for each number of shots (default: 5)")
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


def run(args: argparse.Namespace) -> int:
    """Print the accuracy of each probe."""
    from tclip_jax.evaluation.encoder import Encoder
    from tclip_jax.evaluation.probe_suite import probe, probe_table, source_pair, suite_pairs
    from tclip_jax.evaluation.tasks import named_sources
    from tclip_jax.inference.load import load_model
    from tclip_jax.inference.model import fingerprint
    from tclip_jax.storage import dump_json

    if args.seeds is not None and not args.shots:
        raise ValueError("--seeds is for few-shot probes: it needs --shots K")
    if args.download and not args.suite:
        raise ValueError("--download is for exports: it needs --suite")
    if args.suite:
        pairs = suite_pairs(exports_folder(args), args.suite, args.download)
    else:
        pairs = [source_pair(*pair) for pair in named_sources(args.data)]
    model = load_model(args.model)
    results, errors = probe(
        Encoder(model, batch_size=args.batch_size, dtype=args.dtype),
        pairs,
        model=args.name or args.model,
        weights=fingerprint(model, args.model),
        out=args.out,
        linear=args.linear,
        shots=args.shots,
        seeds=5 if args.seeds is None else args.seeds,
        cache=args.cache,
    )
    if errors and len(pairs) == 1 and not args.suite:
        raise ValueError(*errors.values())
    if args.json:
        print(dump_json({"results": [dataclasses.asdict(result) for result in results], "failed": errors}))
    else:
        print("\n".join([probe_table(results), *(f"FAILED  {name}: {reason}" for name, reason in errors.items())]))
    return 1 if errors else 0
