"""docs/pods.md: its dry runs succeed, and its table lists the environment variables that the code reads."""

from __future__ import annotations

import inspect
import pathlib
import re
import shlex
import subprocess
from collections.abc import Callable

from tclip_jax.parallel import distributed, processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pods.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", "")


def test_every_dry_run_of_the_page_runs(launch: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    commands = [shlex.split(line)[2:] for line in BLOCKS.splitlines() if line.startswith("tclip launch")]
    assert {command[0] for command in commands} == {"local", "tpu-vm", "gke", "slurm", "skypilot"}
    for name, *arguments in commands:
        ran = launch(name, "--dry-run", *arguments)
        assert ran.returncode == 0 and ran.stderr + ran.stdout != "", ran.stderr


def test_the_table_lists_the_environment_variables() -> None:
    source = inspect.getsource(processes) + inspect.getsource(distributed)
    read = set(re.findall(r'"((?:TCLIP|SLURM|TPU|MEGASCALE|JAX|CUDA|OMPI)_\w+)"', source)) - {"TPU_SKIP_MDS_QUERY"}
    assert len(read) > 20
    assert {name for name in read if f"`{name}`" not in PAGE} - {"SLURM_NTASKS", "JAX_PLATFORMS"} == set()
