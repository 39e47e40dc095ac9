"""Every benchmark runs: its --quick ends with one JSON object."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "def main(" in path.read_text("utf-8")]
NAMES = [path.stem for path in SCRIPTS if path.stem != "overview"]  # it draws what the others measured


def test_every_benchmark_has_the_two_flags() -> None:
    for flag in ('"--quick"', '"--json"'):
        assert [path.stem for path in SCRIPTS if flag not in path.read_text("utf-8")] == ["overview"]


@pytest.mark.benchmarks
@pytest.mark.parametrize("name", NAMES)
def test_quick_ends_with_one_json_object(name: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    if name == "accuracy":
        request.getfixturevalue("shared_data")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    assert isinstance(json.loads(ran.stdout.splitlines()[-1]), dict)
