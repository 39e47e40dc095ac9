"""Mappings become dataclasses; errors name the key and its valid values."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.schema import Bounds, check_keys, check_names, defaults, from_mapping, key, number


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    rate: float = 1e-3
    size: tuple[int, int] = (2, 3)
    names: str | tuple[str, ...] = "all"
    scale: float | None = None
    kind: Literal["mse", 2] = "mse"
    on: bool = False
    anything: Any = None


VALUES = st.fixed_dictionaries(
    {"steps": st.integers()},
    optional={
        "rate": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        "size": st.tuples(st.integers(), st.integers()),
        "names": st.text() | st.lists(st.text()).map(tuple),
        "scale": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "kind": st.sampled_from(["mse", 2]),
        "on": st.booleans(),
        "anything": st.none() | st.binary(),
    },
)


@given(VALUES)
def test_values_of_the_right_types_are_unchanged(values: dict[str, Any]) -> None:
    settings = from_mapping(Settings, values, "settings")
    defaults = dataclasses.asdict(Settings(0))
    assert dataclasses.asdict(settings) == defaults | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "settings lacks 'steps'"),
        ({"steps": 1, "rat": 2}, "settings has no 'rat': the nearest is 'rate'"),
        ({"steps": 1, 7: 2}, "settings has no 7: it has "),
        ({"steps": 1.0}, "settings.steps is 1.0: it must be int"),
        ({"steps": True}, "settings.steps is True: it must be int"),
        ({"steps": 1, "rate": "1e-3"}, "settings.rate is '1e-3': it must be float"),
        ({"steps": 1, "rate": False}, "settings.rate is False: it must be float"),
        ({"steps": 1, "size": (1, 2, 3)}, "settings.size is (1, 2, 3): it must be (int, int)"),
        ({"steps": 1, "size": [1, "2"]}, "settings.size is [1, '2']: it must be (int, int)"),
        ({"steps": 1, "names": ("a", 1)}, "settings.names is ('a', 1): it must be str or tuple of str"),
        ({"steps": 1, "scale": "big"}, "settings.scale is 'big': it must be float or None"),
        ({"steps": 1, "kind": "cosine"}, "settings.kind is 'cosine': it must be one of 'mse', 2"),
        ({"steps": 1, "kind": 2.0}, "settings.kind is 2.0: it must be one of 'mse', 2"),
        ({"steps": 1, "on": 1}, "settings.on is 1: it must be bool"),
        (3, "settings is 3: it must be a mapping with the keys of Settings"),
    ],
)
def test_the_error_of_an_invalid_mapping_is_one_line_with_the_valid_values(
    values: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        from_mapping(Settings, values, "settings")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_list_counts_as_a_tuple_of_any_or_a_fixed_length() -> None:
    settings = from_mapping(Settings, {"steps": 1, "size": [4, 5], "names": []}, "settings")
    assert list(settings.size) == [4, 5] and list(settings.names) == []


def test_check_keys_names_the_first_unknown_key_and_the_nearest_valid_one() -> None:
    check_keys([], [], "nothing")
    check_keys(["a", "b"], iter("abc"), "letters")
    with pytest.raises(ValueError, match=r"^the table has no 'stepz': the nearest is 'steps'$"):
        check_keys(["seed", "stepz", "sede"], ["seed", "steps"], "the table")
    with pytest.raises(ValueError, match=r"^the table has no 'seed'$"):
        check_keys(["seed"], [], "the table")
    with pytest.raises(ValueError, match=r"^the table has no 'bfloat16': it has loss, seed, steps$"):
        check_keys(["bfloat16"], ["seed", "loss", "steps"], "the table")
    with pytest.raises(ValueError, match=r"^the table has no 'x': it has 00, .*, 11 and 3 more$"):
        check_keys(["x"], [f"{i:02}" for i in range(15)], "the table")


@dataclasses.dataclass(frozen=True)
class Bounded:
    share: float = key(0.5, "a fraction", ge=0, le=1)
    rate: float = key(1.0, "learning rate", gt=0)
    decay: float = key(0.9, "decay of an average", ge=0, lt=1)
    devices: int = key(-1, "devices along an axis", ge=1, also=(-1,))
    steps: tuple[int, ...] = key((), "steps of a trace", ge=1)
    plain: float = 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": -1e-9}, "x.share is -1e-09: it must be at least 0 and at most 1"),
        ({"share": 1.5}, "x.share is 1.5: it must be at least 0 and at most 1"),
        ({"rate": 0}, "x.rate is 0: it must be above 0"),
        ({"rate": float("inf")}, "x.rate is inf: it must be above 0"),
        ({"decay": 1.0}, "x.decay is 1.0: it must be at least 0 and below 1"),
        ({"decay": float("nan")}, "x.decay is nan: it must be at least 0 and below 1"),
        ({"devices": 0}, "x.devices is 0: it must be at least 1 or -1"),
        ({"devices": -2}, "x.devices is -2: it must be at least 1 or -1"),
        ({"steps": [3, 0]}, "x.steps is [3, 0]: it must be at least 1"),
        ({"plain": float("nan")}, "x.plain is nan: it must be finite"),
        ({"plain": 10**400}, f"x.plain is {10**400}: it must be finite"),
    ],
)
def test_the_error_of_a_number_out_of_bounds_names_the_bounds(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_mapping(Bounded, values, "x")
    assert str(error.value) == message


def test_closed_ends_of_bounds_are_accepted() -> None:
    values = {"share": 0, "rate": 1e-300, "decay": 0.999, "devices": -1, "steps": (1, 2), "plain": -1e300}
    assert dataclasses.asdict(from_mapping(Bounded, values, "x")) == values
    assert from_mapping(Bounded, {"share": 1, "devices": 1}, "x").share == 1


def test_defaults_have_the_form_of_a_configuration_and_are_copies() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Outer:
        inner: Bounded = key(Bounded())
        model: Bounded = key(doc="a preset", written={"name": ["tiny"]})

    values = defaults(Outer)
    assert values == {"inner": dataclasses.asdict(Bounded()), "model": {"name": ["tiny"]}}
    values["model"]["name"].append("changed")
    assert defaults(Outer)["model"] == {"name": ["tiny"]}


def test_a_number_on_the_command_line_is_parsed_and_checked() -> None:
    parse = number(int, ge=1, lt=8)
    assert parse("1") == 1 and parse("7") == 7
    for text, message in [
        ("0", "0 is out of bounds: it must be at least 1 and below 8"),
        ("8", "8 is out"),
        ("x", "'x' is not an int"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError, match="nan is out of bounds: it must be finite"):
        number(float)("nan")
    assert str(Bounds(gt=0, le=2)) == "above 0 and at most 2"


def test_check_names_lists_the_first_five_names() -> None:
    check_names(["b", "a"], ("a", "b"), "this")
    with pytest.raises(
        ValueError, match=r"^this does not fit the model: missing a, b, c, d, e and 3 more; unexpected z$"
    ):
        check_names(["z"], "hgfedcba", "this")
    with pytest.raises(UnicodeError, match=r"^this does not fit the model: unexpected '\\x1b\[2J'$"):
        check_names(["\x1b[2J"], (), "this", UnicodeError)
