"""Examples:
  tclip launch local -n 2 -- train --config quickstart:teacher --workdir runs/teacher
  tclip launch slurm --nodes 4 --dry-run -- train --config ternaryclip:Q-ALL --workdir gs://bucket/run
  tclip launch tpu-vm --help

A command of tclip follows --. With --dry-run the script only prints its commands. A process that exits with code 75
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the name of the launcher; its script parses the other arguments."""
    launchers = sorted(path.name for path in shipped_folder("launch").iterdir() if "." not in path.name)
    parser.add_argument("where", choices=launchers, help="`tclip launch WHERE --help` shows its options")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="[OPTION ...] -- COMMAND ...",
        help="options of the launcher, then -- and a command of tclip",
    )


def run(args: argparse.Namespace) -> None:
    """Replace this process by the launcher's script, with this installation's `tclip` first on its PATH."""
    script = shipped_folder("launch") / args.where
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE; bash would inherit that.
    os.execvpe("bash", ["bash", str(script), *args.arguments], os.environ | {"PATH": path})
