"""Runs the scripts of launch/ with stand-ins for the programs that they call."""

from __future__ import annotations

import os
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from tests.launch.programs import READY, TCLIP

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def stub(tmp_path: pathlib.Path) -> Callable[[str, str], None]:
    """Writes a bash program that is first on the PATH of the scripts; $CALLS is a file for its counts."""

    def write(name: str, text: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\nCALLS={tmp_path}/{name}.calls\n{text}\n")
        path.chmod(0o755)

    return write


@pytest.fixture
def ready(stub: Callable[[str, str], None]) -> None:
    """Programs and accounts with which nothing is missing, and a `tclip` that checks commands and runs none."""
    for name, text in (READY | {"tclip": TCLIP}).items():
        stub(name, text)


@pytest.fixture
def environ(tmp_path: pathlib.Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "TCLIP_CACHE_DIR": ""}


@pytest.fixture
def launch(tmp_path: pathlib.Path, environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in an empty folder."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        script = [str(ROOT / "launch" / name), *arguments]
        return subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=900)

    return run
