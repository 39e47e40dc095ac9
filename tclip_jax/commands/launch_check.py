"""Examples:
  tclip launch check --hosts cloud --mounted /data -- train --config ternaryclip:Q-ALL --workdir gs://bucket/b16
  tclip launch check --hosts cluster --prefix code/ -- train --config own.py --workdir /scratch/b16

Launchers call it before anything is started. It prints assignments for the shell: `wheel` (name of the file that `tclip
launch wheel` writes), `recipe` (a file that the hosts need at PREFIX), `extras` (of the package, by the URLs of the
command), `buckets`, `command` (with the recipe at its place on the hosts) and, of a cluster, which shares the folders
here, `absent` (data and models that are not here).
"""

from __future__ import annotations

import argparse
import shlex
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kind of the hosts, and the command."""
    parser.add_argument(
        "--hosts",
        required=True,
        choices=("cloud", "cluster"),
        help="cluster: the hosts share the folders of this machine; cloud: they do not",
    )
    parser.add_argument("--prefix", default="", help="what the name of a recipe file follows on the hosts")
    parser.add_argument(
        "--mounted",
        default="",
        metavar="DIR[,DIR]",
        help="folders that the hosts have, such as mounted disks and buckets",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="a command of tclip")


def run(args: argparse.Namespace) -> int:
    """Print the assignments; return 2 if hosts cannot reach a file."""
    from tclip_jax.cli import parse_command
    from tclip_jax.recipes import resolve
    from tclip_jax.registry import load_plugin
    from tclip_jax.shipping import absent, out_of_reach, shipment, unread

    command = args.command[args.command[:1] == ["--"] :]
    name, parsed = parse_command(command)
    if name.split()[0] in ("completion", "config", "launch", "plan"):
        raise ValueError(f"`tclip {name}` needs no host: run it here")
    for plugin in parsed.plugin:
        load_plugin(plugin)
    config = {}
    if hasattr(parsed, "config"):
        recipe = resolve(parsed.config, parsed.overrides, teacher_may_miss=name != "train")
        if name == "teacher-cache":
            recipe.teacher = recipe.data.teacher_cache = ""  # --teacher replaces them
        config = recipe.to_dict()
    needed = shipment(command, parsed, config, args.prefix)
    mounted = [folder for folder in args.mounted.split(",") if folder]
    if args.hosts == "cloud":
        lines = list(out_of_reach(parsed, config, mounted))
    else:
        lines = [f"{', '.join(needed.buckets)}: {remedy}" for remedy in unread(needed.extras)]
    for line in lines:
        print(f"tclip launch check: error: {line}", file=sys.stderr)
    if lines:
        return 2
    print(needed.assignments())
    if args.hosts == "cluster":
        print(f"absent=({shlex.join(absent(parsed, config, mounted))})")
    return 0
