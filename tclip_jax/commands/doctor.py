"""Example:
  tclip doctor

The exit code is 0 if everything that is needed is there, else 1.
"""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The form of the report."""
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; marked lines want something done."""
    from tclip_jax.doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        width = max(len(finding.name) for finding in findings)
        for name, value, remedy, optional in findings:
            mark = "!" if remedy and not optional else " "
            print(f"{mark} {name:{width}}  {value}" + (f"; {remedy}" if remedy else ""))
    return int(any(finding.remedy and not finding.optional for finding in findings))
