"""Examples:
  tclip launch local -n 2 -- train --config quickstart:teacher --workdir runs/teacher
  tclip launch slurm --nodes 4 --dry-run -- train --config ternaryclip:Q-ALL --workdir gs://bucket/run
  tclip launch tpu-vm --help

What follows -- is a command of tclip. With --dry-run the commands are printed and not run. What ends with exit code 75
(preempted, all is saved) is started again; what a signal ended, or lost another process, a few times. The exit
code is the command's.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import sys

from tclip_jax.recipes import shipped_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, and all that is left to its script."""
    places = sorted(path.name for path in shipped_folder("launch").iterdir() if "." not in path.name)
    parser.add_argument("where", choices=places, help="`tclip launch WHERE --help` has its options")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="[OPTION ...] -- COMMAND ...")


def run(args: argparse.Namespace) -> None:
    """Becomes the script, which finds this installation's `tclip` first."""
    script = shipped_folder("launch") / args.where
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    sys.stdout.flush()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and bash would then complain in `… | head`
    os.execvpe("bash", ["bash", str(script), *args.arguments], os.environ | {"PATH": path})
