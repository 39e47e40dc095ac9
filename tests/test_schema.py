"""Mappings become dataclasses, or an error that names the key and what would be right."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.schema import check_keys, from_mapping


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
        "rate": st.floats(allow_nan=False) | st.integers(),
        "size": st.tuples(st.integers(), st.integers()),
        "names": st.text() | st.lists(st.text()).map(tuple),
        "scale": st.none() | st.floats(allow_nan=False),
        "kind": st.sampled_from(["mse", 2]),
        "on": st.booleans(),
        "anything": st.none() | st.binary(),
    },
)


@given(VALUES)
def test_every_value_of_the_right_types_is_kept(values: dict[str, Any]) -> None:
    settings = from_mapping(Settings, values, "settings")
    defaults = dataclasses.asdict(Settings(0))
    assert dataclasses.asdict(settings) == defaults | values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "settings lacks 'steps'"),
        ({"steps": 1, "rat": 2}, "settings has no 'rat': the nearest is 'rate'"),
        ({"steps": 1, 7: 2}, "settings has no 7: the nearest is "),
        ({"steps": 1.0}, "settings.steps is 1.0: it must be int"),
        ({"steps": True}, "settings.steps is True: it must be int"),
        ({"steps": 1, "rate": "1e-3"}, "settings.rate is '1e-3': it must be float"),
        ({"steps": 1, "rate": False}, "settings.rate is False: it must be float"),
        ({"steps": 1, "size": (1, 2, 3)}, "settings.size is (1, 2, 3): it must be tuple"),
        ({"steps": 1, "size": [1, "2"]}, "settings.size is [1, '2']: it must be tuple"),
        ({"steps": 1, "names": ("a", 1)}, "settings.names is ('a', 1): it must be str or tuple"),
        ({"steps": 1, "scale": "big"}, "settings.scale is 'big': it must be float or None"),
        ({"steps": 1, "kind": "cosine"}, "settings.kind is 'cosine': it must be one of 'mse', 2"),
        ({"steps": 1, "kind": 2.0}, "settings.kind is 2.0: it must be one of 'mse', 2"),
        ({"steps": 1, "on": 1}, "settings.on is 1: it must be bool"),
        (3, "settings is 3: it must be a mapping with the keys of Settings"),
    ],
)
def test_a_wrong_mapping_is_one_line_that_says_what_is_right(values: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_mapping(Settings, values, "settings")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_list_is_a_tuple_of_any_length_or_of_the_one_given() -> None:
    settings = from_mapping(Settings, {"steps": 1, "size": [4, 5], "names": []}, "settings")
    assert list(settings.size) == [4, 5] and list(settings.names) == []


def test_check_keys_names_the_first_wrong_key_and_the_nearest() -> None:
    check_keys([], [], "nothing")
    check_keys(["a", "b"], iter("abc"), "letters")
    with pytest.raises(ValueError, match=r"^the table has no 'stepz': the nearest is 'steps'$"):
        check_keys(["seed", "stepz", "sede"], ["seed", "steps"], "the table")
    with pytest.raises(ValueError, match=r"^the table has no 'seed'$"):
        check_keys(["seed"], [], "the table")
