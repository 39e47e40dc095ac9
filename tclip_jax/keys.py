"""Recipes: records of everything that determines a stored result, for comparison before the result is reused.

A result, cache, index or checkpoint stores its recipe beside it. A reader makes the recipe anew and compares the two:
`difference` lists what differs, and `digest` gives a name for files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

Recipe = dict[str, Any]
_MISSING = object()


def recipe(**made_by: Any) -> Recipe:
    """Return the arguments as they are after a round trip through JSON.

    Args:
      made_by: everything that changes the result: names, numbers, digests of data and weights. Dataclasses become
        mappings, tuples become lists.

    Raises:
      TypeError: a value is not JSON. Its repr is no substitute, since it may stay the same when the value changes.
    """
    return json.loads(json.dumps(made_by, default=_dataclass_dict, sort_keys=True))


def digest(made_by: Mapping[str, Any]) -> str:
    """Return the BLAKE2b digest of a recipe, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(recipe(**made_by), sort_keys=True).encode(), digest_size=16).hexdigest()


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the differences of two recipes, as "split: 'test', not 'train'; …"; "" if they are equal."""
    return "; ".join(_differences(recipe(**stored), recipe(**wanted), ""))


def _differences(stored: Any, wanted: Any, path: str) -> list[str]:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        names = [*stored, *(name for name in wanted if name not in stored)]
        lines: list[str] = []
        for name in names:
            lines += _differences(
                stored.get(name, _MISSING), wanted.get(name, _MISSING), f"{path}.{name}" if path else name
            )
        return lines
    # Comparing the JSON text distinguishes 1, 1.0 and True, and makes two NaN equal.
    if stored is not _MISSING and wanted is not _MISSING and json.dumps(stored) == json.dumps(wanted):
        return []
    return [f"{path}: {_short(stored)}, not {_short(wanted)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is _MISSING else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _dataclass_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} has type {type(value).__name__}: a recipe holds JSON values and dataclasses of them")
