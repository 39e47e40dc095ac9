"""Example:
  tclip completion bash

Write the output to the file where the shell looks for completions:
  bash  ~/.local/share/bash-completion/completions/tclip
  fish  ~/.config/fish/completions/tclip.fish
  zsh   _tclip, in a folder of `fpath`
Write the file again after each update of tclip-jax.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of the shell."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads the script")


def run(args: argparse.Namespace) -> None:
    """Print the completion script."""
    import shtab

    from tclip_jax.cli import whole_parser

    parser = whole_parser()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete every argument that accepts arbitrary text with file names, since most of them are paths."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.nargs != 0 and action.choices is None and action.type is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
