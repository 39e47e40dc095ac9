"""Losses compile with libtpu without a TPU: the losses alone, by `benchmarks.losses --tpu`."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.tpu_compile
def test_in_a_ring_memory_does_not_grow_with_the_number_of_chips() -> None:
    command = [sys.executable, "-m", "benchmarks.losses", "--tpu", "v5e:4x4", "v5e:8x8", "--json"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    of = {(cell["form"], cell["chips"]): cell for cell in json.loads(process.stdout.splitlines()[-1])["tpu"]}
    assert of["ring", 64]["temporary_bytes"] <= 1.05 * of["ring", 16]["temporary_bytes"]
    assert of["ring", 64]["largest_array"] == of["ring", 16]["largest_array"]
    # When gathered, each chip compares its rows with four times as many columns.
    assert of["gather", 64]["largest_array"] == 4 * of["gather", 16]["largest_array"]
