"""`data bench`: memory against a known size, plausible speeds, and a source without a usable image."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tclip_jax import cli
from tclip_jax.data.sources import FAULTS
from tclip_jax.datasets import bench as input_bench
from tclip_jax.datasets.bench import process_memory
from tclip_jax.runs.config import base_config, run_config

HOLD = """
import subprocess, sys
held = bytearray(b"x") * (64 << 20)
child = subprocess.Popen([sys.executable, "-c", "held = bytearray(b'x') * (64 << 20); print(); input()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(flush=True)
input()
child.communicate(b"\\n")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="this system has no /proc/*/smaps_rollup")
def test_memory_counts_children() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        held = process_memory(process.pid)
        process.communicate(b"\n")
    assert held is not None and 128 << 20 <= held < 192 << 20
    assert process_memory(process.pid) is None


def test_the_command_measures_each_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "bench", "--config", "quickstart:student", "--seconds", "0.3", "--step-seconds", "0.05"]
    assert cli.main([*command, "--workers", "0", "--json"]) == 0
    (speed,) = json.loads(capsys.readouterr().out)
    assert speed["workers"] == 0 and speed["images_per_second"] > 1 and speed["weightless"] == 0
    assert 0 <= speed["wait_share"] < 1 and np.isfinite(speed["first_seconds"])
    assert speed["peak_bytes"] is None or speed["peak_bytes"] > 50 << 20


def test_a_source_without_a_usable_image_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    class MaskedBatches:
        def __next__(self) -> dict[str, np.ndarray]:
            return {"weight": np.zeros(8, np.float32), "fault": np.full(8, FAULTS.index("no_image"), np.int32)}

        def close(self) -> None: ...

    monkeypatch.setattr(input_bench, "train_data", lambda _: MaskedBatches())
    with pytest.raises(ValueError, match=r"^digits: not one of [\d,]+ images can be used \(no_image [\d,]+\), so"):
        input_bench._measure(run_config(base_config()), 0, 0.01, 0.0)
