"""Examples:
  tclip config quickstart:student
  tclip config ternaryclip:Q-ALL optimizer --config.optimizer.learning_rate=5e-4
  tclip config my_recipe.py --changed

A * marks the keys whose value is not the default. The exit code is 0, or 2 after an error.
"""

from __future__ import annotations

import argparse
import json

from tclip_jax.commands.train import add_override_arguments
from tclip_jax.recipes import resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, the sections, and the form of the output."""
    parser.add_argument("config", metavar="RECIPE", help="the name of a shipped recipe, or path.py, with [:ARG]")
    parser.add_argument("sections", nargs="*", default=[], metavar="SECTION", help="print only these sections or keys")
    add_override_arguments(parser)
    parser.add_argument("--changed", action="store_true", help="print only the keys that differ from their defaults")
    parser.add_argument("--json", action="store_true", help="print the values as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Check the configuration and print its keys with their types, bounds and meanings."""
    from tclip_jax.pages import aligned
    from tclip_jax.runs.reference import key_references, values_by_path
    from tclip_jax.schema import check_keys

    config = resolve(args.config, args.overrides, teacher_may_miss=True)
    references, values = {key.path: key for key in key_references()}, values_by_path(config.to_dict())
    known = {part for path in references for part in _prefixes(path)}
    check_keys(args.sections, known, "the configuration")
    chosen = {
        path: key for path, key in references.items() if not args.sections or {*_prefixes(path)} & {*args.sections}
    }
    rows = []
    for path, key in chosen.items():
        value = values.get(path, key.default)
        changed = value != key.default
        if changed or not args.changed:
            kind = key.type + (f", {key.bounds}" if key.bounds else "")
            rows.append(("*" if changed else "", path, value, kind, key.doc))
    if args.json:
        print(json.dumps({path: value for _, path, value, _, _ in rows}, indent=2))
        return
    lines = [("", "key", "value", "type and bounds", "meaning")]
    lines += [(mark, path, _short(value), kind, doc) for mark, path, value, kind, doc in rows]
    print("\n".join(aligned(lines, right=False)))


def _prefixes(path: str) -> list[str]:
    """Return "a", "a.b" and "a.b.c" for "a.b.c"."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
