"""`tclip <command>`: a table of commands, each in its own module and imported only when called."""

from __future__ import annotations

import argparse
import importlib
import keyword
import logging
import sys
from collections.abc import Iterable, Sequence

import tqdm.contrib.logging

# name -> purpose; the module of the same name in tclip_jax.commands (import_ for import, which is a keyword, and
# evaluate_compare for evaluate compare, underscores for all that is no letter) has add_arguments(parser) and run(args).
COMMANDS = {
    "quickstart": "train a teacher and a ternary student on real images, evaluate, pack and export",
    "train": "train a model from a recipe, or go on with a run",
    "plan": "memory, collectives and time of a run on TPUs that are not there, before it is paid for",
    "launch": "start a command on several processes: here, on TPU VMs, GKE, SLURM or SkyPilot",
    "teacher-cache": "embed a data set by a teacher once, to train without it in the step",
    "data prepare": "webdataset tars or another source of captions as an ArrayRecord data set of TFDS",
    "data check": "read a source once: what is broken, sizes, caption lengths, duplicates",
    "data show": "what the model really sees, after augmentation and tokenizing, as an HTML page",
    "data bench": "images per second, waits and memory of the input pipeline, by number of workers",
    "evaluate": "zero-shot accuracy of a run or an artifact",
    "evaluate compare": "two folders of results: differences with intervals, and the images that changed",
    "evaluate probe": "few-shot and linear classifiers on a model's frozen embeddings",
    "embed": "embeddings of images or texts, as .npy or .parquet",
    "classify": "which of some labels fits an image",
    "search": "index a folder of pictures, and find the nearest to a text or a picture",
    "import": "read a checkpoint of open_clip, transformers or OpenAI, and write it as an artifact",
    "pack": "write a run's model as an artifact: trits and scales, ~20x smaller",
    "verify": "compare an artifact bit for bit with what it was made from",
    "inspect": "sizes, shares, zeros and provenance of an artifact",
    "export": "write a model as one folder that open_clip and transformers load",
    "compare": "numerics of two models: weights, activations, inputs; JAX against PyTorch",
    "params": "table of parameters: shape, dtype, sharding, ternary or not",
    "doctor": "versions, devices, precision; what is missing and how to get it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0 or the command's own, or the error's or 2 after one, which is one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words]) or "--help"
    if name not in COMMANDS:
        group = [command for command in COMMANDS if command.startswith(f"{name} ")]
        wanted = [" ".join(arguments[:2])] if group and arguments[1:] and arguments[1][0] != "-" else ["--help"]
        _top_parser(group or COMMANDS).parse_args(wanted if group else arguments or ["--help"])
    module_name = name.replace(" ", "_").replace("-", "_") + "_" * keyword.iskeyword(name)
    module = importlib.import_module(f"tclip_jax.commands.{module_name}")
    parser = argparse.ArgumentParser(
        prog=f"tclip {name}",
        description=COMMANDS[name],
        epilog=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    args = parser.parse_args(_split_overrides(arguments[words:]))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("tclip_jax").setLevel(logging.INFO)
    # Orbax warns of files that it does not need, and logs the traceback of what it then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        with tqdm.contrib.logging.logging_redirect_tqdm():
            code: int | None = module.run(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        print(f"tclip {name}: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return code or 0


def _top_parser(names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tclip",
        description="Ternary CLIP in JAX.",
        epilog="Example: tclip quickstart --workdir runs/quickstart\n`tclip COMMAND --help` has an example of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        commands.add_parser(name, help=COMMANDS[name])
    return parser


def _split_overrides(arguments: list[str]) -> list[str]:
    """--config.a.b=value, an option of any name, becomes --config.KEY a.b=value; what follows -- is another's."""
    split: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return split + arguments[i:]
        if argument.startswith("--config."):
            split += ["--config.KEY", argument.removeprefix("--config.")]
        else:
            split.append(argument)
    return split
