"""The list of mutants that change nothing is of code that is there."""

from __future__ import annotations

import pathlib
import tomllib

HERE = pathlib.Path(__file__).parent


def test_every_line_is_there_and_has_a_reason() -> None:
    listed = tomllib.loads((HERE / "equivalent.toml").read_text())["mutant"]
    keys = [(each["file"], each["operator"], each["line"], each["place"]) for each in listed]
    assert len(keys) == len(set(keys)) > 0
    for each in listed:
        lines = (HERE.parents[1] / "tclip_jax" / each["file"]).read_text().splitlines()
        assert each["line"] in map(str.strip, lines), f"{each['file']} has no such line: {each['line']}"
        assert each["why"]
