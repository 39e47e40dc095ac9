"""What people write, checked against declarations: a wrong key, type or bound is named, with what would be right.

A declaration is a field of a frozen dataclass: `rate: float = key(1e-3, "the peak", gt=0)`. Its bounds are enforced
from there, and the documentation's table is made from there.
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
MOST = 2**31 - 1  # steps, rows and the like are int32 on devices


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The numbers that are taken: finite, and from `ge` or above `gt`, to `le` or below `lt`; or one of `also`."""

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
    """What a declaration says beside name, type and default."""

    doc: str
    bounds: Bounds
    written: Any = None


def key(default: Any = dataclasses.MISSING, doc: str = "", *, written: Any = None, **bounds: Any) -> Any:
    """A field of a dataclass that people fill.

    Args:
      default: the value where nothing is written; left out, the key is required.
      doc: one phrase with the unit, for the documentation.
      written: the default as people write it, where the field holds what was made of it.
      bounds: `ge`, `gt`, `le`, `lt`, `also` of `Bounds`: of a number, and of every number in a tuple.
    """
    return dataclasses.field(default=default, metadata={"key": Key(doc, Bounds(**bounds), written)})


def key_of(field: dataclasses.Field[Any]) -> Key:
    """The declaration of a field; of one without, no text, and any finite number."""
    return field.metadata.get("key", Key("", Bounds()))


def defaults(cls: type) -> dict[str, Any]:
    """Every key of a declaration with its default, as people write it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        written = key_of(field).written
        value = field.default if written is None else written
        found[field.name] = defaults(type(value)) if dataclasses.is_dataclass(value) else copy.deepcopy(value)
    return found


def number(kind: type[int] | type[float], **bounds: Any) -> Callable[[str], Any]:
    """The `type` of an argument of the command line: an int or float within `Bounds`, else one line that says which."""
    allowed = Bounds(**bounds)

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}: it must be {allowed}") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"{text} is out of bounds: it must be {allowed}")
        return value

    return parse


count = number(int, ge=1)  # of images, steps, processes


def plain(text: object, limit: int = 80) -> str:
    """What a stranger's file says, as a part of a one-line error: cut, and quoted where it cannot be printed."""
    found = str(text)[: limit + 1]
    cut = found if len(found) <= limit else f"{found[: limit - 1]}…"
    return cut if cut.isprintable() else repr(cut)


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raises ValueError for the first given key that is not valid, naming the nearest that is."""
    valid = list(valid)
    for each in given:
        if each not in valid:
            near = difflib.get_close_matches(str(each), valid, 1, 0.0)
            raise ValueError(f"{where} has no {each!r:.80}" + (f": the nearest is {near[0]!r}" if near else ""))


def check_names(
    found: Collection[str], expected: Collection[str], what: str, error: type[ValueError] = ValueError
) -> None:
    """Raises `error`, naming the first names that are missing and unexpected, unless both hold the same."""
    wrong = {"missing": set(expected) - set(found), "unexpected": set(found) - set(expected)}
    if any(wrong.values()):
        named = "; ".join(f"{kind} {_first_of(names)}" for kind, names in wrong.items() if names)
        raise error(f"{what} does not fit the model: {named}")


def _first_of(names: Collection[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(plain, sorted(names)[:count])) + more


def from_mapping(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`; `where` names the mapping in errors.

    Raises:
      ValueError: no mapping, an unknown or missing key, a value of another type than the field's or out of its bounds,
        or one that `cls` itself refuses.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r:.80}: it must be a mapping with the keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(given, fields, where)
    for name, field in fields.items():
        if name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks {name!r}")
    check_values(cls, given, where)
    return cls(**given)


def check_values(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for the first value of another type than the field of `cls`, or out of its bounds."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, bounds = values[field.name], key_of(field).bounds
        if not _matches(value, hints[field.name]):
            raise ValueError(f"{where}.{field.name} is {value!r:.80}: it must be {describe(hints[field.name])}")
        if any(each not in bounds for each in _numbers(value)):
            raise ValueError(f"{where}.{field.name} is {value!r}: it must be {bounds}")


def describe(hint: Any) -> str:
    """The type in words: "int", "one of 'mse', 'cosine'", "int or None"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
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


def _numbers(value: Any) -> Iterator[float]:
    """The number that a value is, or the numbers in a tuple."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)
