"""The command line `tclip COMMAND`; each command is a module that is imported only when it is called."""

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
from typing import Any, NoReturn, get_args

import tqdm.contrib.logging

from tclip_jax.log import Form, formatter_of, start_logging
from tclip_jax.pages import printable, without_details
from tclip_jax.registry import load_plugin

# Command -> purpose. The module tclip_jax.commands.NAME defines add_arguments(parser) and run(args); its docstring ends
# the help text. NAME is the command with underscores for spaces and hyphens; `import`, a keyword, is import_.
COMMANDS = {
    "quickstart": "train a teacher and a ternary student on real images, evaluate, pack and export",
    "train": "train a model from a recipe, or resume a run",
    "config": "print the configuration of a recipe: values, types, bounds and meanings",
    "plan": "estimate memory, communication and step time of a run without a TPU",
    "launch": "run a command in several processes: on this machine, TPU VMs, GKE, SLURM or SkyPilot",
    "launch check": "check that hosts can run a command: its options, its recipe, and the files that it names",
    "launch wheel": "write the wheel of this installation, which launchers send to hosts",
    "teacher-cache": "compute a teacher's embeddings once, so that training steps do not run the teacher",
    "data prepare": "convert webdataset tars or another captioned source to an ArrayRecord data set of TFDS",
    "data check": "read every sample of a source and report broken samples, sizes, caption lengths, duplicates",
    "data show": "write an HTML page of training samples after augmentation and tokenization",
    "data bench": "measure images per second, waits and memory of the input pipeline, by number of workers",
    "evaluate": "measure the zero-shot accuracy of a run, an artifact or a checkpoint",
    "evaluate compare": "compare two folders of results: differences with intervals, and changed predictions",
    "evaluate probe": "fit few-shot and linear classifiers on a model's frozen embeddings",
    "embed": "write embeddings of images or texts as .npy or .parquet",
    "classify": "rank labels by how well they fit each image",
    "search": "index a folder of images, and find the images nearest to a text or an image",
    "import": "convert a checkpoint of open_clip, transformers or OpenAI to an artifact",
    "sensitivity": "show how much the loss rises when a part of a model is ternary or in 4 bits, and propose rules",
    "pack": "write a run's model as an artifact: trits and scales, ~20x smaller",
    "verify": "compare an artifact bit for bit with its source",
    "inspect": "show the sizes, ternary share, zeros and provenance of an artifact",
    "export": "write a model as one folder that other libraries and runtimes load",
    "push": "push an export to the Hugging Face hub: list what goes, refuse what is private, resume",
    "compare": "compare the weights, activations or inputs of two models; JAX against PyTorch",
    "params": "list the parameters of a model: shape, dtype, sharding, ternary or not",
    "doctor": "check versions, devices and precision, and show how to install missing packages",
    "completion": "print a script that completes commands and options in a shell",
}

# What fsspec says of the package that reads a URL.
_STORES = re.compile(r"[Ii]nstall (gcsfs|s3fs) ")

EXIT_CODES = """Exit codes:
  0    success
  1    a check found a difference or a fault, or an input was left out; or a bug in this program
  2    wrong usage or wrong input: one line names the error and the fix
  3    evaluate: every data set has a result, but in one some images do not count
  69   train: the other processes of the run were not found, or one was lost
  75   train: stopped by SIGTERM after a checkpoint was saved; the same command resumes
  130  stopped by Ctrl-C; train saves a checkpoint first
  141  the reader of the output closed it, as `head` does
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and print an error as one line, or with --debug as a traceback.

    Args:
      arguments: the command and its options; None for those of the process.

    Returns:
      The exit code, one of EXIT_CODES.
    """
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # Python's own flush at exit would print a broken pipe as an error.
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        # Discard the output that is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _output_is_closed() -> bool:
    """Return whether the reader of stdout or stderr has closed it."""
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
    name, args = parse_command(arguments)
    start_logging(args.debug, args.log_format)
    try:
        for plugin in args.plugin:
            load_plugin(plugin)
        with tqdm.contrib.logging.logging_redirect_tqdm():
            code: int | None = _module(name).run(args)
    except KeyboardInterrupt:
        _print_error(f"tclip {name}: interrupted", args.log_format)
        return 130
    except Exception as error:
        if args.debug or (isinstance(error, BrokenPipeError) and _output_is_closed()):
            raise
        _print_error(f"tclip {name}: {printable(without_details(_error_line(error)))}", args.log_format)
        return getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)
    return code or 0


def _print_error(line: str, form: Form) -> None:
    """Print the line with which a command ends; as a record of the log if that is JSON."""
    record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, line, None, None)
    print(formatter_of(form).format(record) if form == "json" else line, file=sys.stderr)


def parse_command(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """Return the name of a command and its parsed options.

    Raises:
      SystemExit: there is no such command, or its options are wrong, which a message on stderr says; or help is shown.
    """
    length = 2 if " ".join(arguments[:2]) in COMMANDS else 1  # words of the command
    name = " ".join(arguments[:length]) or "--help"
    if name not in COMMANDS:
        group = [command for command in COMMANDS if command.startswith(f"{name} ")]
        if not group and name[0] != "-":
            near = [f"the nearest is {each!r}; " for each in difflib.get_close_matches(name, COMMANDS, 1)]
            _top_parser(COMMANDS).error(f"no command {name!r}: {''.join(near)}tclip --help lists all")
        unknown = [arguments[1]] if group and arguments[1:] and not arguments[1].startswith("-") else ["--help"]
        _top_parser(group or COMMANDS, name if group else "").parse_args(unknown if group else arguments or ["--help"])
    parser = _Parser(prog=f"tclip {name}", **_settings(name))
    add_arguments(parser, name)
    return name, parser.parse_args(_common_first(_split_overrides(list(arguments[length:]))))


def whole_parser() -> argparse.ArgumentParser:
    """Return one parser of all commands and their options, for shell completion."""
    parser = argparse.ArgumentParser(prog="tclip", description="Ternary CLIP in JAX.")
    groups = {"": parser.add_subparsers(metavar="COMMAND")}
    for name in sorted(COMMANDS):  # `evaluate` before `evaluate compare`
        group, _, last = name.rpartition(" ")
        if group not in groups:
            groups[group] = groups[""].add_parser(group, help=f"{group} …").add_subparsers(metavar="COMMAND")
        command = groups[group].add_parser(last, **_settings(name), help=COMMANDS[name])
        if any(longer.startswith(f"{name} ") for longer in COMMANDS):
            groups[name] = command.add_subparsers(metavar="COMMAND")
        add_arguments(command, name)
    return parser


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a command and the options that all commands share."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file or module with quantizers, losses, data sources or augmentations of your own; repeatable",
    )
    parser.add_argument(
        "--log-format",
        choices=get_args(Form),
        default="text",
        help="the log on stderr: text, or json with an object on each line (default: text)",
    )
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


def _error_line(error: Exception) -> str:
    """Describe an error in one line: an expected error by its message, an unexpected error also by its location."""
    if store := _STORES.search(str(error)):
        return f"error: {error}: pip install 'tclip-jax[{store[1].removesuffix('fs')}]'"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"error: {os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)) or hasattr(error, "exit_code"):
        return f"error: {error}"
    if isinstance(error, ModuleNotFoundError):
        return f"error: {error}: `tclip doctor` names the extra that installs it"
    at = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]} ({at.filename}:{at.lineno})"
    return f"unexpected {message}; --debug shows the traceback"


def _top_parser(names: Iterable[str], group: str = "") -> argparse.ArgumentParser:
    """Return a parser that only lists commands: all, or those of a group such as `data`."""
    parser = argparse.ArgumentParser(
        prog=f"tclip {group}".rstrip(),
        description="Ternary CLIP in JAX.",
        epilog="Example: tclip quickstart --workdir runs/quickstart\n"
        f"`{f'tclip {group}'.rstrip()} COMMAND --help` shows the options of a command and an example."
        + (f"\n\n{EXIT_CODES}" if names is COMMANDS else ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in names:
        commands.add_parser(name.removeprefix(group).lstrip(), help=COMMANDS[name])
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors show overrides as they were written, before `_split_overrides`."""

    def error(self, message: str) -> NoReturn:
        super().error(message.replace("--config.KEY ", "--config."))


def _split_overrides(arguments: list[str]) -> list[str]:
    """Rewrite --config.a.b=value, or "--config.a.b value", as --config.KEY a.b=value.

    Arguments after -- belong to another command.
    """
    split: list[str] = []
    rest = list(arguments)
    while rest and rest[0] != "--":
        argument = rest.pop(0)
        if argument.startswith("--config."):
            if "=" not in argument and rest and not rest[0].startswith("--"):
                argument += f"={rest.pop(0)}"
            split += ["--config.KEY", argument.removeprefix("--config.")]
        else:
            split.append(argument)
    return split + rest


def _common_first(arguments: list[str]) -> list[str]:
    """Move the options that all commands share to the front, so that they may also follow an action such as `index`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    common: list[str] = []
    rest: list[str] = []
    words = iter(arguments[:end])
    for word in words:
        if word in ("--log-format", "--plugin"):
            common.append(f"{word}={next(words, '')}")
        else:
            (common if word == "--debug" or word.startswith(("--log-format=", "--plugin=")) else rest).append(word)
    return common + rest + arguments[end:]


if __name__ == "__main__":
    sys.exit(main())
