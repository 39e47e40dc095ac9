"""Runs of real processes with injected faults, and checks of their results."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tclip_jax.inference.load import load_run
from tclip_jax.runs.record import read_metrics
from tclip_jax.runs.steps import saved_steps

HERE = pathlib.Path(__file__).parent
PATIENCE = 300.0  # seconds until a process counts as hanging, also on a busy machine


class Run:
    """A run in its own workdir, with one or two processes that have one CPU device each."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, processes: int = 2) -> None:
        self.workdir, self.processes = workdir, processes
        self._cache, self._starts = cache, 0
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, fault: str = "", *options: str) -> None:
        """Starts all processes, with the faults of child.py."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.workdir.parent.mkdir(parents=True, exist_ok=True)
        self._starts += 1
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "OPENBLAS_NUM_THREADS": "1",
        }
        arguments = [f"--config={HERE / 'recipe.py'}", f"--workdir={self.workdir}", *options]
        arguments.append(f"--config.compile_cache={self._cache}")
        self.children = []
        for index in range(self.processes):
            several = {
                "TCLIP_COORDINATOR": address,
                "TCLIP_NUM_PROCESSES": str(self.processes),
                "TCLIP_PROCESS_ID": str(index),
            }
            with self._log(index).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, str(HERE / "child.py"), fault, "train", *arguments],
                    env=environment | (several if self.processes > 1 else {}),
                    stdout=log,
                    stderr=log,
                )
            self.children.append(child)

    def _log(self, index: int) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}.{self._starts}.{index}.log")

    def log(self, index: int = 0) -> str:
        """Returns the log of a process of the last start."""
        return self._log(index).read_text(errors="replace")

    def wait(self) -> list[int]:
        """Waits for all processes; returns their exit codes."""
        return [child.wait(PATIENCE) for child in self.children]

    def finish(self, fault: str = "", *options: str) -> None:
        """Starts all processes and checks that they succeed."""
        self.start(fault, *options)
        codes = self.wait()
        assert codes == [0] * self.processes, self.log(0) + self.log(self.processes - 1)

    def until(self, condition: Callable[[], Any]) -> bool:
        """Waits for a condition; returns False if a process ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if any(child.poll() is not None for child in self.children):
                return False
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.002)
        return True

    def kill(self, index: int) -> None:
        """Kills one process with SIGKILL, and then the others, as launchers do."""
        self.children[index].send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Kills all processes."""
        for child in self.children:
            child.kill()
            child.wait()

    def steps(self) -> list[int]:
        """Returns the steps in metrics.jsonl."""
        return [line["step"] for line in read_metrics(self.workdir) if "loss" in line]

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl, without values that depend on the clock or on restarts."""
        lines = [
            {name: value for name, value in line.items() if "second" not in name and name != "programs_compiled"}
            for line in read_metrics(self.workdir)
        ]
        return sorted(lines, key=lambda line: (line["step"], sorted(line)))

    def saved(self) -> list[int]:
        """Returns the steps that have a checkpoint."""
        return saved_steps(self.workdir / "checkpoints")

    def assert_same(self, other: Run) -> None:
        """Checks that parameters are bit-identical, and that both have each step once with the same metrics."""
        params = (jax.device_get(load_run(run.workdir)[1].params) for run in (self, other))
        jax.tree.map(np.testing.assert_array_equal, *params)
        assert self.metrics() == other.metrics()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A cache of compiled programs, for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path: pathlib.Path, cache: pathlib.Path) -> Iterator[Callable[..., Run]]:
    """Makes runs, and kills their processes after the test."""
    runs: list[Run] = []

    def make(name: str, processes: int = 2) -> Run:
        runs.append(Run(tmp_path / name, cache, processes))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> Callable[[int], Run]:
    """Returns the run without faults for a number of processes, made once."""
    made: dict[int, Run] = {}

    def get(processes: int) -> Run:
        if processes not in made:
            made[processes] = Run(tmp_path_factory.mktemp("undisturbed") / "run", cache, processes)
            made[processes].finish()
        return made[processes]

    return get
