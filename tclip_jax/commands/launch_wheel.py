"""Example:
  tclip launch wheel --out dist

Launchers send this wheel to hosts. It has no native CPU kernel, so it installs on every platform; XLA serves instead.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import zipfile

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path, help="folder of the wheel")
    parser.add_argument("--unpack", action="store_true", help="write the files of the wheel, for PYTHONPATH")


def run(args: argparse.Namespace) -> None:
    """Write the wheel; the log names it, because stdout is that of the command that is launched."""
    from tclip_jax.shipping import write_wheel

    wheel = write_wheel(args.out)
    if args.unpack:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(args.out)
        wheel.unlink()
    _logger.info("wrote %s", args.out if args.unpack else wheel)
