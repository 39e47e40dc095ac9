"""What every test relies on."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ABORTS = "import os\ndef test_fails():\n    assert False\ndef test_aborts():\n    os.abort()\ndef test_passes(): pass\n"
PASSES = "import time\ndef test_passes():\n    time.sleep(1)\n"


def test_child_processes_import_this_tree_whatever_is_installed(tmp_path: pathlib.Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('tclip_jax').origin)"
    for options in (
        (),
        ("-S",),
    ):  # -S: nothing that is installed is found, an editable installation of this tree neither
        ran = subprocess.run([sys.executable, *options, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert ran.stdout.strip() == str(ROOT / "tclip_jax" / "__init__.py"), ran.stderr


@pytest.mark.slow
def test_a_test_that_ends_its_process_ends_the_run(tmp_path: pathlib.Path) -> None:
    hooks = "from tests.conftest import pytest_configure, pytest_handlecrashitem\n"
    for name, text in (("conftest", hooks), ("test_aborts", ABORTS), ("test_first", PASSES), ("test_second", PASSES)):
        (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-n2"]
    command += ["-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"CI": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 1, ran.stdout
    lines = ran.stdout.splitlines()
    (at_once,) = (number for number, line in enumerate(lines) if "test_aborts.py::test_fails: " in line)
    assert lines[at_once].startswith("FAILED ") and lines[at_once].endswith("assert False")
    (ended,) = (number for number, line in enumerate(lines) if "test_aborts.py::test_aborts ended its process" in line)
    assert at_once < ended
