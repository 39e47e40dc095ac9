"""Examples:
  tclip push release USER/NAME --licence apache-2.0 --dry-run
  tclip push release USER/NAME --licence cc-by-nc-4.0 --private --yes

FOLDER is what `tclip export` wrote. The files, their sizes and the front matter of the model card are listed first.
Private text is refused with its file and line: absolute paths, buckets, workdirs, names of the user and the machine,
secrets. Files are committed together; the same command resumes an interrupted push. See docs/hub.md.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the folder, the repository and its model card."""
    parser.add_argument("folder", metavar="FOLDER", help="an export")
    parser.add_argument("repository", metavar="USER/NAME", help="the repository on the hub, created if there is none")
    parser.add_argument(
        "--licence",
        default="",
        metavar="ID",
        help="the licence as the hub names it, such as apache-2.0 (default: that of README.md)",
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list what would go, and send nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before sending")
    parser.add_argument(
        "--public",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that is public though it looks private, such as gs://public-bucket; repeatable",
    )


def run(args: argparse.Namespace) -> None:
    """List what goes, ask, send it, and print the URL of the commit."""
    from tclip_jax.interop.push import listing, prepare, push

    upload = prepare(args.folder, args.repository, licence=args.licence, public=args.public)
    print(listing(upload))
    if args.dry_run:
        return
    if not args.yes:
        _ask(f"Push to {args.repository}? [y/N] ")
    print(push(upload, private=args.private))


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask on: pass --yes, or --dry-run to send nothing")
    if input(question).strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was sent: the answer was not y")
