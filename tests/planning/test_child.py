"""The process that compiles a step: its errors."""

from __future__ import annotations

import pathlib
import sys

import pytest

from tclip_jax.planning import child, sweep
from tclip_jax.planning.child import DoesNotFitError, compiled_facts
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.sweep import Point, sweep_rows
from tclip_jax.recipes import load_recipe

XLA = (
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
    " temporaries (21.51G) exceeds available HBM (15.75G)."
)


@pytest.fixture
def ends_with(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A file with what the process writes to stderr before it fails."""
    errors, program = tmp_path / "errors", tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\ncat {errors} >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(child, "libtpu_mismatch", lambda: "")
    return errors


def test_a_step_without_a_place_for_its_arrays_does_not_fit(ends_with: pathlib.Path) -> None:
    ends_with.write_text(f"I0000 libtpu starts\n{XLA}\n")
    with pytest.raises(DoesNotFitError, match=r"^does not fit v5e:16x16: the compiler needs 21\.51 GiB .* 15\.75 GiB"):
        compiled_facts({}, "v5e:16x16", "", None)


@pytest.mark.parametrize("text", ["", "one\ntwo: RESOURCE_EXHAUSTED: no sockets\n"])
def test_another_error_is_shown_as_it_is(ends_with: pathlib.Path, text: str) -> None:
    ends_with.write_text(text)
    with pytest.raises(
        ValueError, match=r"v4:2x2x1 ended with exit code 1: (no error message|two: .*sockets)$"
    ) as error:
        compiled_facts({}, "v4:2x2x1", "", None)
    assert not isinstance(error.value, DoesNotFitError)


def test_a_sweep_says_which_points_do_not_fit_and_which_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe("ternaryclip:Q-ALL")
    h100, made = parse_topology("h100:8"), sweep.make_plan
    errors = iter([DoesNotFitError("does not fit"), ValueError("another error"), None])

    def make_plan(*arguments: object, **options: object) -> object:
        if error := next(errors):
            raise error
        return made(config, h100)

    monkeypatch.setattr(sweep, "make_plan", make_plan)
    points = sweep.run_sweep([({"remat": value}, config) for value in ("a", "b", "c")], h100)
    assert [(point.fits, point.error) for point in points[:2]] == [(False, "does not fit"), (True, "another error")]
    rows = sweep_rows(points)
    assert [row[2].split(",")[0] for row in rows[1:]] == ["NO", "-", "yes"]
    assert len({len(row) for row in rows}) == 1
    assert "another error" in sweep.sweep_text([Point({"remat": "x"}, None, "another error"), points[2]])
