"""Frozen dataclasses from mappings that people wrote: a wrong key or type is named, with what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raises ValueError for the first given key that is not valid, naming the nearest that is."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, 1, 0.0)
            raise ValueError(f"{where} has no {key!r}" + (f": the nearest is {near[0]!r}" if near else ""))


def from_mapping(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`; `where` names the mapping in errors.

    Raises:
      ValueError: no mapping, an unknown or missing key, a value of another type than the field's, or one that `cls`
        itself refuses.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}: it must be a mapping with the keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(given, fields, where)
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    hints = typing.get_type_hints(cls)
    for key, value in given.items():
        if not _matches(value, hints[key]):
            raise ValueError(f"{where}.{key} is {value!r}: it must be {_describe(hints[key])}")
    return cls(**given)


def _describe(hint: Any) -> str:
    """The type in words: "int", "one of 'mse', 'cosine'", "int or None"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    return "None" if hint is types.NoneType else getattr(origin or hint, "__name__", str(hint))


def _matches(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(each) == len(value) and all(map(_matches, value, each))
    return hint is Any or isinstance(value, origin or hint)
