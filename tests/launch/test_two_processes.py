"""`tclip launch local` with real processes: the same run as one, also when one of them is killed on the way."""

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
# One device in all processes together, or two: their number decides how sums are rounded.
ENVIRON = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}


def tclip(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tclip_jax", *arguments]
    return subprocess.run(command, env=ENVIRON | environ, capture_output=True, text=True, timeout=540)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_devices(tmp_path: pathlib.Path) -> None:
    two = tclip("launch", "local", "-n", "2", "--", *RUN, "--workdir", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    # gloo says on stdout that it is connected.
    shown = [line for line in two.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(shown) == 1 and shown[0].startswith(f"{tmp_path}/two: done, zero-shot accuracy ")
    assert "waiting for 2 processes (TCLIP_*) at localhost:" in two.stderr and "restarting" not in two.stderr
    one = tclip(*RUN, "--workdir", str(tmp_path / "one"), XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert one.returncode == 0 and "waiting" not in one.stderr, one.stderr
    assert len(metrics(tmp_path / "one")) == 5
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.faults
def test_a_killed_process_is_noticed_and_both_begin_again(tmp_path: pathlib.Path) -> None:
    run = [*RUN, "--config.steps=40", "--config.checkpoint.every=5", "--workdir", str(tmp_path)]
    command = [sys.executable, "-m", "tclip_jax", "launch", "local", "-n", "2", "--", *run]
    with subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, text=True) as launched:
        while not (tmp_path / "checkpoints" / "5").exists():
            assert launched.poll() is None
            time.sleep(0.05)
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(launched.pid), "-f", "tclip train"]).split()[1]), 9)
        _, said = launched.communicate(timeout=540)
    # Whichever ends first decides: the process that was killed, or the other when it has noticed.
    ended = re.search(rf"exit code ({128 + signal.SIGKILL}|{LostProcess.exit_code}): restarting", said)
    assert launched.returncode == 0 and ended, said
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, 41))
