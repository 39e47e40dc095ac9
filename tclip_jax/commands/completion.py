"""Example:
  tclip completion bash

Put what it prints where the shell looks for it: ~/.local/share/bash-completion/completions/tclip of bash,
~/.config/fish/completions/tclip.fish of fish, a file _tclip in a folder of `fpath` of zsh. Write it anew after an
update.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For which shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> None:
    """Prints the script."""
    import shtab

    from tclip_jax.cli import whole_parser

    parser = whole_parser()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Whatever takes any text is completed by files: it is a path, or nothing that could be known."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
