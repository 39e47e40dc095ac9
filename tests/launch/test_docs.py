"""docs/pods.md: its dry runs succeed, and its table lists the environment variables that the code reads."""

from __future__ import annotations

import inspect
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest

from tclip_jax import shipping
from tclip_jax.parallel import distributed, processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pods.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", "")


@pytest.mark.slow
@pytest.mark.usefixtures("ready")
def test_every_dry_run_of_the_page_runs(launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    commands = [shlex.split(line)[2:] for line in BLOCKS.splitlines() if line.startswith("tclip launch")]
    assert {command[0] for command in commands} == {"local", "tpu-vm", "gke", "slurm", "skypilot"}
    for name, *arguments in commands:
        ran = launch(name, "--dry-run", *arguments)
        assert ran.returncode == 0 and ran.stdout.startswith("+ "), ran.stderr


def test_the_launcher_of_the_page_runs_by_its_path(
    stub: Callable[[str, str], None], environ: dict[str, str], tmp_path: pathlib.Path
) -> None:
    (script,) = re.findall(r"```\n(#!/usr/bin/env bash\n# Runs a command on one.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my-launcher").write_text(script)
    stub("ssh", 'echo "ssh $*"')
    stub("scp", 'echo "scp $*"')
    (tmp_path / "my own.py").write_text(
        "from tclip_jax.runs.config import base_config\n\n\ndef get_config():\n    return base_config()\n"
    )
    options = ["--host=two", "--", "train", "--config", "my own.py", "--workdir", "gs://b/a b"]
    call = [sys.executable, "-m", "tclip_jax", "launch", "./my-launcher", *options]
    ran = subprocess.run(call, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=900)
    command = "tclip launch local -- train --config 'my own.py' --workdir 'gs://b/a b'"
    assert (ran.returncode, ran.stdout) == (0, f"scp {tmp_path}/my own.py two:\nssh two {command}\n"), ran.stderr


def test_the_page_shows_what_is_printed() -> None:
    texts = (ROOT / "launch" / "common.sh").read_text() + inspect.getsource(shipping)
    for line in ("missing: ", "dry run: ", "a Google account: gcloud auth login", "hosts of a cloud do not have "):
        assert line in PAGE and line in texts
    assert {"gcs", "s3"} <= set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )


def test_the_table_lists_the_environment_variables() -> None:
    source = inspect.getsource(processes) + inspect.getsource(distributed)
    read = set(re.findall(r'"((?:TCLIP|SLURM|TPU|MEGASCALE|JAX|CUDA|OMPI)_\w+)"', source)) - {"TPU_SKIP_MDS_QUERY"}
    assert len(read) > 20
    assert {name for name in read if f"`{name}`" not in PAGE} - {"SLURM_NTASKS", "JAX_PLATFORMS"} == set()
