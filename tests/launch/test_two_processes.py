"""`tclip launch local` with two processes: the same metrics as one process, also after one of them is killed."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tclip_jax.parallel.distributed import LostProcess

RUN = ["train", "--config", "quickstart:teacher,runlocal", "--config.eval.every=1000"]
# Without XLA_FLAGS each process has one device. The number of all devices decides how sums are rounded.
ENVIRON = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def tclip(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tclip_jax", *arguments]
    return subprocess.run(command, env=ENVIRON | environ, capture_output=True, text=True, timeout=540)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # Several processes also compile the programs that add up values of all.
    return [
        {name: value for name, value in line.items() if "second" not in name and name != "programs_compiled"}
        for line in lines
    ]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_with_two_devices(tmp_path: pathlib.Path) -> None:
    # Two devices do not divide a batch of 99 pairs, nor the last one, of 1.
    held_out = {"name": "v", "kind": "loss", "source": "digits", "split": "test", "batch_size": 99}
    run = [*RUN, f"--config.evals=[{held_out}]"]
    two = tclip("launch", "local", "-n", "2", "--", *run, "--workdir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    # Gloo logs its connections to stdout.
    shown = [line for line in two.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(shown) == 1 and shown[0].startswith(f"{tmp_path}/two: done, zero-shot accuracy ")
    assert "waiting for 2 processes (TCLIP_*) at localhost:" in two.stderr and "restarting" not in two.stderr
    one = tclip(*run, "--workdir", str(tmp_path / "one"), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert one.returncode == 0 and "waiting" not in one.stderr, one.stderr
    assert len(metrics(tmp_path / "one")) == 6 and "v/loss" in metrics(tmp_path / "one")[-1]
    for actual, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert actual.keys() == expected.keys() and actual == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.faults
def test_a_killed_process_restarts_both(tmp_path: pathlib.Path) -> None:
    run = [*RUN, "--config.steps=40", "--config.checkpoint.every=5", "--workdir", str(tmp_path)]
    command = [sys.executable, "-m", "tclip_jax", "launch", "local", "-n", "2", "--", *run]
    with subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, text=True) as launched:
        while not (tmp_path / "checkpoints" / "5").exists():
            assert launched.poll() is None
            time.sleep(0.05)
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(launched.pid), "-f", "tclip train"]).split()[1]), 9)
        _, stderr = launched.communicate(timeout=540)
    # The exit code is that of the process that ends first: the killed one, or the one that lost it.
    ended = re.search(rf"exit code ({128 + signal.SIGKILL}|{LostProcess.exit_code}): restarting", stderr)
    assert launched.returncode == 0 and ended, stderr
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, 41))
