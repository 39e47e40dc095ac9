"""Examples:
  tclip launch local -n 2 -- train --config quickstart:teacher --workdir runs/teacher
  tclip launch slurm --nodes 4 --dry-run -- train --config ternaryclip:Q-ALL --workdir /scratch/run
  tclip launch tpu-vm --help
  tclip launch ./my-launcher -- train --config quickstart:teacher --workdir runs/teacher

A command of tclip follows --. With --dry-run the script checks what it needs, and only prints its commands; the exit
code is 1 if something is missing. WHERE may be the path of your own bash script; TCLIP_LAUNCH is then the folder of the
shipped ones, for `source "$TCLIP_LAUNCH/common.sh"`. A process that exits with code 75
(preempted, checkpoint saved) is always restarted. A process that is killed by a signal, or that loses another process,
is restarted a few times. The exit code is that of the command.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys

from tclip_jax.recipes import shipped_folder


class _Launchers(list[str]):
    """The shipped launchers, which help and completion list. The path of any other script is a launcher too."""

    def __contains__(self, where: object) -> bool:
        return super().__contains__(where) or os.sep in str(where)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of the launcher; its script parses the other arguments."""
    launchers = _Launchers(sorted(path.name for path in shipped_folder("launch").iterdir() if "." not in path.name))
    parser.add_argument(
        "where",
        choices=launchers,
        help="`tclip launch WHERE --help` shows its options; the path of a script, such as ./my-launcher, works too",
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="[OPTION ...] -- COMMAND ...",
        help="options of the launcher, then -- and a command of tclip",
    )


def run(args: argparse.Namespace) -> None:
    """Replace this process by the launcher's script, with this installation's `tclip` first on its PATH."""
    if args.plugin:
        raise ValueError("--plugin belongs to the command: write it after --")
    shipped = shipped_folder("launch")
    script = shipped / args.where if os.sep not in args.where else pathlib.Path(args.where)
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such launcher: write the path of a bash script")
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environ = os.environ | {"PATH": path, "TCLIP_LAUNCH": str(shipped)}
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE; bash would inherit that.
    # argparse drops a -- that directly follows the name of the launcher.
    separator = ["--"] if args.arguments and args.arguments[0][:1] != "-" else []
    os.execvpe("bash", ["bash", str(script), *separator, *args.arguments], environ)
