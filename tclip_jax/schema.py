"""Checks of configurations and command lines against declarations; errors name the key and its valid values.

A declaration is a field of a frozen dataclass: `rate: float = key(1e-3, "peak learning rate", gt=0)`. Its bounds are
enforced, and the configuration table of the documentation is generated from it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 2**31 - 1  # counts of steps and rows are int32 on devices
_NEAR = 0.5  # similarity of two names, 0 to 1, from which an error suggests one for the other


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers with ends `ge` (≥) or `gt` (>) and `le` (≤) or `lt` (<), and the numbers `also`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: tuple[float, ...] = ()

    def __contains__(self, number: float) -> bool:
        return number in self.also or (
            abs(number) <= sys.float_info.max  # neither NaN nor infinite
            and (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
        )

    def __str__(self) -> str:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        limits = [f"{word} {getattr(self, name)}" for name, word in words.items() if getattr(self, name) is not None]
        return " or ".join([" and ".join(limits) or "finite", *map(str, self.also)])


@dataclasses.dataclass(frozen=True)
class Key:
    """A declaration without its name, type and default; see `key`."""

    doc: str
    bounds: Bounds
    written: Any = None


def key(default: Any = dataclasses.MISSING, doc: str = "", *, written: Any = None, **bounds: Any) -> Any:
    """Declare a dataclass field as a key of a configuration.

    Args:
      default: the value if the key is absent; without it the key is required.
      doc: one phrase with the unit, for the documentation.
      written: the default in the form of a configuration file, if the field holds a converted value.
      bounds: `ge`, `gt`, `le`, `lt`, `also` of `Bounds`, for a number or every number in a tuple.
    """
    return dataclasses.field(default=default, metadata={"key": Key(doc, Bounds(**bounds), written)})


def key_of(field: dataclasses.Field[Any]) -> Key:
    """Return the declaration of a field; for a plain field an empty text and no bounds but finite."""
    return field.metadata.get("key", Key("", Bounds()))


def declared(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return the keys of a declaration by name: field and type.

    A class may declare more by a method `more_keys`. A field with `repr=False` is not a key.
    """
    parts = (cls.more_keys(), cls) if hasattr(cls, "more_keys") else (cls,)
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for part in parts:
        hints = typing.get_type_hints(part)
        found |= {field.name: (field, hints[field.name]) for field in dataclasses.fields(part) if field.repr}
    return found


def defaults(cls: type) -> dict[str, Any]:
    """Return every key of a declaration with its default, in the form of a configuration file."""
    values: dict[str, Any] = {}
    for field, _ in declared(cls).values():
        written = key_of(field).written
        value = field.default if written is None else written
        values[field.name] = defaults(type(value)) if dataclasses.is_dataclass(value) else copy.deepcopy(value)
    return values


def number(kind: type[int] | type[float], **bounds: Any) -> Callable[[str], Any]:
    """Return an argparse `type` that parses an int or float and checks its `Bounds`."""
    allowed = Bounds(**bounds)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_INDEFINITE[kind]}: it must be {allowed}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: it must be {allowed}")
        return value

    return parse


count = number(int, ge=1)  # the type of counts: images, steps, processes
_INDEFINITE = {int: "an int", float: "a float"}


def plain(text: object, limit: int = 80) -> str:
    """Return text of an untrusted file for a one-line error: cut to `limit` characters, escaped if not printable."""
    start = str(text)[: limit + 1]
    cut = start if len(start) <= limit else f"{start[: limit - 1]}…"
    return cut if cut.isprintable() else repr(cut)


def check_keys(names: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise ValueError for the first of `names` that is not in `valid`; see `suggestion` for the rest of the error."""
    valid = list(valid)
    for name in names:
        if name not in valid:
            raise ValueError(f"{where} has no {name!r:.80}{suggestion(str(name), valid)}")


def suggestion(name: str, valid: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the nearest valid name or, if none is near, the valid names."""
    if near := difflib.get_close_matches(name, valid, 1, _NEAR):
        return f": the nearest is {near[0]!r}"
    return f": it has {_first_of(valid, 12)}" if valid else ""


def check_names(
    names: Collection[str], expected: Collection[str], what: str, error: type[ValueError] = ValueError
) -> None:
    """Raise `error` unless both collections hold the same names; it lists the first missing and unexpected ones."""
    mismatches = {"missing": set(expected) - set(names), "unexpected": set(names) - set(expected)}
    if any(mismatches.values()):
        listed = "; ".join(f"{kind} {_first_of(group)}" for kind, group in mismatches.items() if group)
        raise error(f"{what} does not fit the model: {listed}")


def _first_of(names: Collection[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(plain, sorted(names)[:count])) + more


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return the dataclass `cls` with these values, checked.

    Args:
      cls: the dataclass that declares the keys.
      values: by key.
      where: the name of the mapping in errors, such as "config.data".

    Raises:
      ValueError: `values` is no mapping, a key is unknown or missing, a value has the wrong type or is out of bounds,
        or `cls` refuses it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r:.80}: it must be a mapping with the keys of {cls.__name__}")
    fields = declared(cls)
    check_keys(values, fields, where)
    for name, (field, _) in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    check_values(cls, values, where)
    return cls(**values)


def check_values(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for the first value that does not have the type and bounds of its field in `cls`."""
    for field, hint in declared(cls).values():
        if field.name not in values:
            continue
        value, bounds = values[field.name], key_of(field).bounds
        if not _matches(value, hint):
            raise ValueError(f"{where}.{field.name} is {value!r:.80}: it must be {describe(hint)}")
        if any(each not in bounds for each in _numbers(value)):
            raise ValueError(f"{where}.{field.name} is {value!r}: it must be {bounds}")


def describe(hint: Any) -> str:
    """Return a type in words: "int", "one of 'mse', 'cosine'", "int or None", "(int, int)", "tuple of str"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return "tuple" if arguments[0] is Any else f"tuple of {describe(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(describe, arguments))})"
    if dataclasses.is_dataclass(hint):
        return "mapping"
    if origin is Mapping:
        return f"mapping of {' to '.join(map(describe, arguments))}"
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
        hints = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(hints) == len(value) and all(map(_matches, value, hints))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _matches(name, arguments[0]) and _matches(each, arguments[1]) for name, each in value.items()
        )
    return hint is Any or isinstance(value, origin or hint)


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a value: itself, or those in nested tuples."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
