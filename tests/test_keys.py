"""Recipes: equal recipes have equal digests, and differences are named."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from tclip_jax.keys import difference, digest, recipe

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
_RECIPES = st.dictionaries(st.text(min_size=1, max_size=3), _VALUES, max_size=4)


@given(_RECIPES, _RECIPES)
def test_recipes_differ_exactly_when_their_digests_do(stored: dict, wanted: dict) -> None:
    assert (difference(stored, wanted) == "") == (digest(stored) == digest(wanted))
    assert difference(stored, stored) == ""
    assert digest(dict(reversed(stored.items()))) == digest(stored)


def test_a_difference_shows_both_values() -> None:
    stored = recipe(split="test", seeds=(0, 1), data={"samples": 3, "content": "aa"})
    wanted = recipe(split="train", seeds=[0, 1], data={"samples": 3, "content": "bb"}, shots=4)
    assert difference(stored, wanted) == (
        "data.content: 'aa', not 'bb'; split: 'test', not 'train'; shots: nothing, not 4"
    )


def test_equal_numbers_of_different_types_differ() -> None:
    assert difference({"x": 1}, {"x": True}) == "x: 1, not True"
    assert digest({"x": 1}) != digest({"x": 1.0})


def test_dataclasses_become_mappings() -> None:
    @dataclasses.dataclass
    class Point:
        x: int
        y: tuple[int, ...]

    assert recipe(at=Point(1, (2, 3))) == {"at": {"x": 1, "y": [2, 3]}}


def test_a_value_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError, match="has type object: a recipe holds JSON values"):
        recipe(x=object())
