"""Runs of real processes that faults are put into, and what is asked of them afterwards."""

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
PATIENCE = 300.0  # seconds; what takes longer hangs, even on a busy machine


class Run:
    """A run in a workdir of its own, by one or two processes with a CPU device each."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, processes: int = 2) -> None:
        self.workdir, self.processes = workdir, processes
        self._cache, self._starts = cache, 0
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self, fault: str = "", *options: str) -> None:
        """Starts all processes, with a fault of child.py."""
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
        given = [f"--config={HERE / 'recipe.py'}", f"--workdir={self.workdir}", *options]
        given.append(f"--config.compile_cache={self._cache}")
        self.children = []
        for index in range(self.processes):
            several = {
                "TCLIP_COORDINATOR": address,
                "TCLIP_NUM_PROCESSES": str(self.processes),
                "TCLIP_PROCESS_ID": str(index),
            }
            with self._log(index).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, str(HERE / "child.py"), fault, "train", *given],
                    env=environment | (several if self.processes > 1 else {}),
                    stdout=log,
                    stderr=log,
                )
            self.children.append(child)

    def _log(self, index: int) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}.{self._starts}.{index}.log")

    def log(self, index: int = 0) -> str:
        """What a process of the last start has said."""
        return self._log(index).read_text(errors="replace")

    def wait(self) -> list[int]:
        """The exit codes of all processes."""
        return [child.wait(PATIENCE) for child in self.children]

    def finish(self, fault: str = "", *options: str) -> None:
        """A start that must end well."""
        self.start(fault, *options)
        codes = self.wait()
        assert codes == [0] * self.processes, self.log(0) + self.log(self.processes - 1)

    def until(self, condition: Callable[[], Any]) -> bool:
        """Waits for a condition; false if the run is over before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if any(child.poll() is not None for child in self.children):
                return False
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.002)
        return True

    def kill(self, index: int) -> None:
        """kill -9 of one process, and, as a launcher does, of the others, who cannot go on."""
        self.children[index].send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [line["step"] for line in read_metrics(self.workdir) if "loss" in line]

    def metrics(self) -> list[dict[str, Any]]:
        """Its lines without what depends on the clock."""
        lines = [
            {name: value for name, value in line.items() if "seconds" not in name and "per_second" not in name}
            for line in read_metrics(self.workdir)
        ]
        return sorted(lines, key=lambda line: (line["step"], sorted(line)))

    def saved(self) -> list[int]:
        """The steps that there are checkpoints of."""
        return saved_steps(self.workdir / "checkpoints")

    def assert_same(self, other: Run) -> None:
        """Every bit of the parameters, and every step once in the metrics, with the same numbers."""
        params = (jax.device_get(load_run(run.workdir)[1].params) for run in (self, other))
        jax.tree.map(np.testing.assert_array_equal, *params)
        assert self.metrics() == other.metrics()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Compiled programs, for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(tmp_path: pathlib.Path, cache: pathlib.Path) -> Iterator[Callable[..., Run]]:
    """Makes runs, and ends what is left of them."""
    runs: list[Run] = []

    def make(name: str, processes: int = 2) -> Run:
        runs.append(Run(tmp_path / name, cache, processes))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path) -> Callable[[int], Run]:
    """The run that nothing happens to, by so many processes: made once."""
    made: dict[int, Run] = {}

    def get(processes: int) -> Run:
        if processes not in made:
            made[processes] = Run(tmp_path_factory.mktemp("undisturbed") / "run", cache, processes)
            made[processes].finish()
        return made[processes]

    return get
