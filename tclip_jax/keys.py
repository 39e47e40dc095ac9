"""What made something that is kept: recorded beside it, and compared before it is used again.

A result, a cache, an index or a checkpoint keeps `recipe(...)`, a mapping of everything that decides its content. Who
wants to use it again makes the mapping anew: `difference` says in words what is not the same, `digest` names a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

Recipe = dict[str, Any]
_NOTHING = object()


def recipe(**made_by: Any) -> Recipe:
    """A mapping as it is after a round trip through JSON.

    Args:
      made_by: everything that changes the content: names, numbers, digests of data and weights. Dataclasses become
        mappings, tuples lists.

    Raises:
      TypeError: a value that JSON cannot hold; a repr of it might not change where the value does.
    """
    return json.loads(json.dumps(made_by, default=_plain, sort_keys=True))


def digest(made_by: Mapping[str, Any]) -> str:
    """32 hexadecimal digits, other ones for another recipe."""
    return hashlib.blake2b(json.dumps(recipe(**made_by), sort_keys=True).encode(), digest_size=16).hexdigest()


def difference(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two recipes, as "split: 'test', not 'train'; …"; "" where nothing does."""
    return "; ".join(_differences(recipe(**kept), recipe(**wanted), ""))


def _differences(kept: Any, wanted: Any, where: str) -> list[str]:
    if isinstance(kept, dict) and isinstance(wanted, dict):
        names = [*kept, *(name for name in wanted if name not in kept)]
        found: list[str] = []
        for name in names:
            path = f"{where}.{name}" if where else name
            found += _differences(kept.get(name, _NOTHING), wanted.get(name, _NOTHING), path)
        return found
    # Compared as text, so that 1, 1.0 and True differ, and two NaN do not.
    if kept is not _NOTHING and wanted is not _NOTHING and json.dumps(kept) == json.dumps(wanted):
        return []
    return [f"{where}: {_short(kept)}, not {_short(wanted)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is _NOTHING else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}: a recipe holds what JSON holds, and dataclasses of that")
