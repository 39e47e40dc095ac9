"""What every test relies on."""

from __future__ import annotations

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_child_processes_import_this_tree_whatever_is_installed(tmp_path: pathlib.Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('tclip_jax').origin)"
    for options in (
        (),
        ("-S",),
    ):  # -S: nothing that is installed is found, an editable installation of this tree neither
        ran = subprocess.run([sys.executable, *options, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert ran.stdout.strip() == str(ROOT / "tclip_jax" / "__init__.py"), ran.stderr
