"""At least 1,000 hostile files for each reader: one line of error, 10 s, a bound of memory, nothing left behind.

`pytest tests/fuzz -m fuzz` draws other files each time and prints the seeds; TCLIP_FUZZ_SEED repeats one, and
TCLIP_FUZZ_INPUTS sets another number.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).with_name("child.py")
ROOT = CHILD.parents[2]
READERS = (
    *("safetensors", "manifest", "gguf", "big_vision", "torchscript", "transformers", "open_clip"),
    *("onnx", "litert", "tar", "csv", "parquet", "arrayrecord", "golden", "overrides"),
)


@pytest.mark.fuzz
@pytest.mark.parametrize("reader", READERS)
def test_hostile_files(reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    if reader == "litert":
        pytest.importorskip("litert_converter", reason="litert-converter is not installed (pip install -e '.[litert]')")
    seed = int(os.environ.get("TCLIP_FUZZ_SEED", secrets.randbits(32)))
    inputs = int(os.environ.get("TCLIP_FUZZ_INPUTS", "1000"))
    with capsys.disabled():
        print(f"\n{reader}: TCLIP_FUZZ_SEED={seed}")
    result = subprocess.run(
        [sys.executable, CHILD, reader, str(seed), str(inputs)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, f"{reader}, seed {seed}: exit code {result.returncode}\n{result.stderr[-6000:]}"
    assert int(result.stdout.split(": ")[-1].split()[0]) >= inputs, result.stdout
