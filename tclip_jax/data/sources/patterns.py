"""Patterns that name many files, local or on remote stores: braces and globs."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator

from tclip_jax.data.sources.remote import file_system, is_remote

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MAX_NAMES = 10_000_000


def find_files(pattern: str) -> list[str]:
    """Return the files that a pattern names, as absolute paths or URLs.

    Args:
      pattern: paths or URLs with braces and globs, joined by `::`. The files keep the order of the pattern; those of a
        glob are sorted. Only globs are checked for existence.

    Raises:
      FileNotFoundError: a glob matches no file.
      ValueError: a URL cannot be opened, or there are more than ten million names.
    """
    files: list[str] = []
    for part in pattern.split("::"):
        if is_remote(part):
            file_system(part)  # raises if the URL cannot be opened
        # Absolute, because indexes are keyed by the names of their files and must not depend on the working folder.
        for name in expand_braces(part if is_remote(part) else os.path.abspath(os.path.expanduser(part))):
            if not glob.has_magic(name):
                files.append(name)
                continue
            matches = sorted(_glob(name))
            if not matches:
                raise FileNotFoundError(f"{name}: no file matches")
            files += matches
    return files


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return glob.glob(pattern)
    system, path = file_system(pattern)
    return [system.unstrip_protocol(match) for match in system.glob(path)]


def expand_braces(pattern: str) -> list[str]:
    """Expand `{000..999}`, `{0..9..2}` and `{a,b}` as a shell does; other braces are kept.

    The library braceexpand is not used: it builds all numbers of a range before the first name, so a short pattern can
    use all memory, and it refuses a brace that is not closed.

    Raises:
      ValueError: the pattern has more than ten million names.
    """
    names = list(itertools.islice(_expand(pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise ValueError(f"{pattern}: its braces expand to more than {_MAX_NAMES:,} names")
    return names


def _expand(pattern: str) -> Iterator[str]:
    start = 0
    while (start := pattern.find("{", start)) >= 0:
        stop = _closing_brace(pattern, start)
        choices = _choices(pattern[start + 1 : stop]) if stop else None
        if choices is not None:
            for choice in choices:
                for tail in _expand(pattern[stop + 1 :]):
                    yield pattern[:start] + choice + tail
            return
        start += 1
    yield pattern


def _closing_brace(pattern: str, start: int) -> int:
    """Return the index of the brace that closes the brace at `start`, or 0."""
    depth = 0
    for index in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[index], 0)
        if not depth:
            return index
    return 0


def _choices(body: str) -> Iterator[str] | None:
    """Return what the text between two braces expands to, or None if it is neither a range nor a list."""
    if match := _RANGE.fullmatch(body):
        return _numbers(*match.groups())
    parts, depth, start = [], 0, 0
    for index, character in enumerate(body):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append(body[start:index])
            start = index + 1
    parts.append(body[start:])
    return (name for part in parts for name in _expand(part)) if len(parts) > 1 else None


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    by = abs(int(step or 1)) or 1
    numbers = range(int(first), int(last) + 1, by) if int(first) <= int(last) else range(int(first), int(last) - 1, -by)
    return (f"{number:0{width}d}" for number in numbers)
