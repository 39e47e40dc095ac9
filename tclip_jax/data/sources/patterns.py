"""Names of many files at once: braces and globs, here and on remote stores."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_MAX_NAMES = 10_000_000


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of `{000..999}`, `{0..9..2}` and `{a,b}`; braces of any other content stay as they are.

    Not the library braceexpand: it holds every number of a range before the first name, so that a pattern of a few
    letters takes all memory, and it refuses a brace that is not closed.

    Raises:
      ValueError: more than ten million names.
    """
    names = list(itertools.islice(_expand(pattern), _MAX_NAMES + 1))
    if len(names) > _MAX_NAMES:
        raise ValueError(f"{pattern}: its braces make more than {_MAX_NAMES:,} names")
    return names


def _expand(pattern: str) -> Iterator[str]:
    start = 0
    while (start := pattern.find("{", start)) >= 0:
        stop = _closing(pattern, start)
        choices = _choices(pattern[start + 1 : stop]) if stop else None
        if choices is not None:
            for choice in choices:
                for tail in _expand(pattern[stop + 1 :]):
                    yield pattern[:start] + choice + tail
            return
        start += 1
    yield pattern


def _closing(pattern: str, start: int) -> int:
    """Where the brace at `start` is closed; 0 if nowhere."""
    depth = 0
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if not depth:
            return place
    return 0


def _choices(inside: str) -> Iterator[str] | None:
    if match := _RANGE.fullmatch(inside):
        return _numbers(*match.groups())
    parts, depth, last = [], 0, 0
    for place, letter in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append(inside[last:place])
            last = place + 1
    parts.append(inside[last:])
    return (name for part in parts for name in _expand(part)) if len(parts) > 1 else None


def _numbers(first: str, last: str, step: str | None) -> Iterator[str]:
    padded = any(re.match(r"-?0\d", number) for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    by = abs(int(step or 1)) or 1
    numbers = range(int(first), int(last) + 1, by) if int(first) <= int(last) else range(int(first), int(last) - 1, -by)
    return (f"{number:0{width}d}" for number in numbers)


def is_remote(path: str) -> bool:
    """Whether the path is a URL."""
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there.

    Raises:
      ValueError: there is no such kind of URL, or what reads it is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


def find_files(pattern: str) -> list[str]:
    """Every file that a pattern names: parts joined by `::`, in the order of the pattern, each glob in its own order.

    Raises:
      FileNotFoundError: a glob that no file matches.
    """
    found: list[str] = []
    for part in pattern.split("::"):
        if is_remote(part):
            file_system(part)  # refuses what nothing here can open
        # An index is found again by the names of its files, from any working folder.
        for name in expand_braces(part if is_remote(part) else os.path.abspath(os.path.expanduser(part))):
            if not glob.has_magic(name):
                found.append(name)
                continue
            matches = sorted(_glob(name))
            if not matches:
                raise FileNotFoundError(f"{name}: no file matches")
            found += matches
    return found


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return glob.glob(pattern)
    system, path = file_system(pattern)
    return [system.unstrip_protocol(match) for match in system.glob(path)]
