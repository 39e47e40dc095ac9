"""Patterns of file names: braces equal those of braceexpand, the library that webdataset uses."""

from __future__ import annotations

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tclip_jax.data.sources import patterns
from tclip_jax.data.sources.patterns import expand_braces, find_files

NUMBERS = st.one_of(st.integers(-20, 120).map(str), st.integers(0, 120).map("{:04}".format))
RANGES = st.tuples(NUMBERS, NUMBERS).map(lambda pair: f"{{{pair[0]}..{pair[1]}}}")
LISTS = st.lists(st.text("ab-", max_size=2), min_size=2, max_size=3).map(lambda names: f"{{{','.join(names)}}}")
PATTERNS = st.lists(st.one_of(st.text("ab/.-", max_size=3), RANGES, LISTS), max_size=3).map("".join)


@pytest.mark.torch
@given(PATTERNS)
def test_braces_equal_braceexpand(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{3..0..2}", ["3", "1"]),
        ("x{a,{b,c}d}", ["xa", "xbd", "xcd"]),
        ("{a} {} {", ["{a} {} {"]),
        ("{x}{0..1}", ["{x}0", "{x}1"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..99999}" * 3, "{0..99999999999}"])
def test_too_many_names_are_refused(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_MAX_NAMES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 names"):
        expand_braces(pattern)


def test_files_of_several_patterns(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "a.tar", "x"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    files = find_files(f"{tmp_path}/*.tar::{{0..1}}.tar::memory://m/{{a,b}}.tar")
    here = os.getcwd()
    names = ["a.tar", "b.tar", "0.tar", "1.tar"]
    assert files == [*(f"{here}/{name}" for name in names), "memory://m/a.tar", "memory://m/b.tar"]
    with pytest.raises(FileNotFoundError, match=r"none\*: no file matches"):
        find_files(f"{tmp_path}/none*")
