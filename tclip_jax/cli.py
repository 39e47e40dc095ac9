"""`tclip <command>`: a table of commands, each in its own module and imported only when called."""

from __future__ import annotations

import argparse
import difflib
import importlib
import keyword
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import tqdm.contrib.logging

from tclip_jax.pages import printable

# name -> purpose; the module of the same name in tclip_jax.commands (import_ for import, which is a keyword, and
# evaluate_compare for evaluate compare, underscores for all that is no letter) has add_arguments(parser) and run(args).
COMMANDS = {
    "quickstart": "train a teacher and a ternary student on real images, evaluate, pack and export",
    "train": "train a model from a recipe, or resume a run",
    "plan": "estimate memory, communication and step time of a run without a TPU",
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
    "completion": "a script by which a shell completes commands and options",
}

# Lines by which Orbax's other threads tell of an error that the one that had it has told.
_SAID_AGAIN = re.compile(
    r"thread=write_metadata_after_commits\]|Failed to run \d+ Handler Commit operations|Save Finalize thread \("
)

EXIT_CODES = """Exit codes:
  0    done
  1    a check found a difference or a fault, or an input was left out; or a bug of this program
  2    wrong usage or wrong input: one line says what, and what would be right
  3    of evaluate: every data set has a result, but in one images do not count
  69   of train: the other processes of the run were not found, or one was lost
  75   of train: stopped by SIGTERM, all is saved, the same command resumes
  130  stopped by Ctrl-C; of train: all is saved
  141  what reads the output ended first, as `head` does
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is one of EXIT_CODES. An error is one line, and with --debug a traceback."""
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # here, not at the end of Python, which would complain
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        # What is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _output_is_closed() -> bool:
    """Whether nobody reads stdout or stderr any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write("")
            stream.flush()
            readers = select.poll()
            readers.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in readers.poll(0)):
                return True
        except BrokenPipeError:
            return True
    return False


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words]) or "--help"
    if name not in COMMANDS:
        group = [command for command in COMMANDS if command.startswith(f"{name} ")]
        if not group and name[0] != "-":
            near = difflib.get_close_matches(name, COMMANDS, 1, 0.0)[0]
            _top_parser(COMMANDS).error(f"no command {name!r}: the nearest is {near!r}; tclip --help lists all")
        wanted = [" ".join(arguments[:2])] if group and arguments[1:] and arguments[1][0] != "-" else ["--help"]
        _top_parser(group or COMMANDS).parse_args(wanted if group else arguments or ["--help"])
    module, parser = _module(name), argparse.ArgumentParser(prog=f"tclip {name}", **_settings(name))
    add_arguments(parser, name)
    args = parser.parse_args(_split_overrides(arguments[words:]))
    start_logging(args.debug)
    try:
        with tqdm.contrib.logging.logging_redirect_tqdm():
            code: int | None = module.run(args)
    except KeyboardInterrupt:
        print(f"tclip {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug or (isinstance(error, BrokenPipeError) and _output_is_closed()):
            raise
        print(f"tclip {name}: {printable(_told(error))}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)
    return code or 0


def start_logging(debug: bool = False) -> None:
    """Logs to stderr: our own progress, and warnings of others; of absl, by which Orbax and Grain log, its errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("tclip_jax").setLevel(logging.INFO)
    absl = logging.getLogger("absl")
    absl.setLevel(logging.ERROR)  # Orbax warns of files that it does not need
    absl.removeFilter(_in_a_line) if debug else absl.addFilter(_in_a_line)


def _in_a_line(record: logging.LogRecord) -> bool:
    """Shortens an error of absl to its line, without traceback; False for what Orbax says again of the same failure."""
    message = " ".join(record.getMessage().partition(" [source locations")[0].split())
    record.msg, record.args, record.exc_info, record.exc_text = message, (), None, None
    return not _SAID_AGAIN.search(message)


class _Printable(logging.Formatter):
    """Messages quote files and their names: no byte of these reaches the terminal as it is."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands with all their options, as shell completion wants it."""
    parser = argparse.ArgumentParser(prog="tclip", description="Ternary CLIP in JAX.")
    groups = {"": parser.add_subparsers(metavar="COMMAND")}
    for name in sorted(COMMANDS):  # so that `evaluate` comes before `evaluate compare`
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=f"{group} …").add_subparsers(metavar="COMMAND")
        command = groups[group].add_parser(last, **_settings(name), help=COMMANDS[name])
        if any(other.startswith(f"{name} ") for other in COMMANDS):
            groups[name] = command.add_subparsers(metavar="COMMAND")
        add_arguments(command, name)
    return parser


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of one command, and those that all have."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    _module(name).add_arguments(parser)


def _module(name: str) -> ModuleType:
    module = name.replace(" ", "_").replace("-", "_") + "_" * keyword.iskeyword(name)
    return importlib.import_module(f"tclip_jax.commands.{module}")


def _settings(name: str) -> dict[str, Any]:
    text = _module(name).__doc__ or ""
    codes = "" if "xit code" in text else "\nThe exit code is 0, or 2 after an error.\n"
    return {
        "description": COMMANDS[name],
        "epilog": text + codes,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _told(error: Exception) -> str:
    """One line: the message of what is expected to fail, and of anything else where it happened."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)) or hasattr(error, "exit_code"):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"error: {error}: `tclip doctor` says which extra brings it"
    at = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]} ({at.filename}:{at.lineno})"
    return f"unexpected {message}; --debug shows the traceback"


def _top_parser(names: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tclip",
        description="Ternary CLIP in JAX.",
        epilog="Example: tclip quickstart --workdir runs/quickstart\n`tclip COMMAND --help` has an example of each."
        + (f"\n\n{EXIT_CODES}" if names is COMMANDS else ""),
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
