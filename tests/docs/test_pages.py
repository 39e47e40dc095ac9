"""The code in README and docs/ runs: python page by page, bash in a shell with the recipes in their test mode."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from pages import FILE, PAGES, ROOT, blocks

from tclip_jax.runs.config import base_config, run_config

# page -> what is done with its blocks instead.
ELSEWHERE = {
    "docs/deploy.md": "test_onnx_runtimes.py, test_litert_runtimes.py and test_torch_packed.py, which need an export",
    "docs/inference.md": "tests/inference/test_docs.py, which needs every command of the page in order",
    "docs/plan.md": "parsed alone, by test_commands: minutes of the TPU compiler; tests/planning runs it small",
    "docs/release.md": "tests/test_release.py, and .ci/run, which runs .ci/install-check",
    "docs/pods.md": "parsed alone, by test_commands: clouds and clusters; tests/launch runs the scripts with stand-ins",
}
# What a bash block may hold that is not run here: .ci/run reads the README's line and runs it.
INSTALLS = re.compile(r"^(python3 -m venv|\.venv/bin/|\.ci/run)")
PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
BASH = [page for page in PAGES if any(block.language == "bash" for block in blocks(page))]


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page: pathlib.Path, workplace: pathlib.Path) -> None:
    if name(page) in ELSEWHERE:
        return
    # Pages on recipes show what stands within get_config.
    namespace = {"config": base_config()}
    namespace["config"].teacher = "any"
    for block in blocks(page):
        if block.language == "python" and not FILE.match(block.text):
            code = compile("\n" * block.line + block.text, name(page), "exec")
            exec(code, namespace)
    run_config(namespace["config"])


@pytest.mark.slow
@pytest.mark.parametrize("page", BASH, ids=lambda page: page.name)
def test_bash_runs(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    texts = [block.text for block in blocks(page) if block.language == "bash" and not INSTALLS.match(block.text)]
    if name(page) in ELSEWHERE or not texts:
        return
    for block in blocks(page):  # a block that starts with the name of a file
        if match := FILE.match(block.text):
            (tmp_path / match[1]).write_text(block.text)
    (tmp_path / "bin").mkdir()
    for command, module in (("tclip", "-m tclip_jax"), ("python", "")):
        shim = tmp_path / "bin" / command
        shim.write_text(f'#!/bin/bash\nexec {sys.executable} {module} "$@"\n')
        shim.chmod(0o755)
    script = "set -euo pipefail\n" + re.sub(r"--config (quickstart:\w+)", r"--config \1,runlocal", "\n".join(texts))
    environment = os.environ | {"PATH": f"{shim.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1100)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]


def test_the_plug_ins_are_short() -> None:
    files = [block.text for block in blocks(ROOT / "docs" / "extending.md") if block.text.startswith("# ")]
    assert len(files) == 4 and all(len(text.splitlines()) < 40 for text in files)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, top to bottom, as one program; the minute of training is cut to two steps."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    program = "\n".join(line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!")))
    program, cuts = re.subn(r"^STEPS = .*$", "STEPS = 2", program, flags=re.MULTILINE)
    assert cuts == 1
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-4000:]
