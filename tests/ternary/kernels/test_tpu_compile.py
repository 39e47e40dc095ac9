"""Kernels compile with libtpu without a TPU: a part of `benchmarks.tpu_static`, which covers every shape."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.tpu_compile
@pytest.mark.parametrize("device", ["v4", "v5e", "v5p", "v6e"])
def test_the_products_of_mlps_compile_with_weights_of_two_bits(device: str) -> None:
    command = [sys.executable, "-m", "benchmarks.tpu_static", "--quick", "--json", "--devices", device]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    cells = json.loads(process.stdout.splitlines()[-1])["compiled"]
    expected = {"mosaic_tpu", "mosaic_tpu_int8", "xla_int2"} if device != "v4" else {"mosaic_tpu"}
    assert {cell["implementation"] for cell in cells} == expected  # no int2 on v4
    assert not any(cell["collectives"] for cell in cells)
    weighed = [cell for cell in cells if "weight_bytes" in cell]
    assert {(cell["k"], cell["n"]) for cell in weighed} == {(768, 3072), (3072, 768), (4096, 1024)}
    for cell in weighed:
        groups = {3: 4, 12: 16, 16: 16}[cell["k"] // 256]  # rows of scales, padded to whole tiles of HBM
        assert cell["weight_bytes"] == cell["k"] * cell["n"] // 4 + 4 * groups * cell["n"]
    if device == "v5e":
        assert {cell["device"] for cell in cells} == {"v5e", "v5e, 4 devices"}
