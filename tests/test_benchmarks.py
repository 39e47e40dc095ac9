"""Every benchmark runs: its --quick ends with one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import deploy, runtimes
from benchmarks.deploy_runtimes import RUNTIMES
from benchmarks.peer_files import two_bit_codes
from benchmarks.peers import least_cosine
from benchmarks.runtimes import Outcome, chosen_names, rows_of, table

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted((ROOT / "benchmarks").glob("*.py")) if "def main(" in path.read_text("utf-8")]
DEPLOYED = {"tclip_jax A8": [5.0, 4.0], "onnx in OpenVINO": [3.0, 6.0]}
NAMES = [path.stem for path in SCRIPTS if path.stem != "overview"]  # it draws what the others measured


def test_every_benchmark_has_the_two_flags() -> None:
    for flag in ('"--quick"', '"--json"'):
        assert [path.stem for path in SCRIPTS if flag not in path.read_text("utf-8")] == ["overview"]


@pytest.mark.benchmarks
@pytest.mark.parametrize("name", NAMES)
def test_quick_ends_with_one_json_object(name: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> None:
    if name == "accuracy":
        request.getfixturevalue("shared_data")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    assert isinstance(json.loads(ran.stdout.splitlines()[-1]), dict)


def test_two_bit_codes_hold_a_ternary_matrix_exactly() -> None:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 2, (5, 2)).astype(np.float32)
    trits = rng.integers(-1, 2, (5, 200))
    trits[:, 0] = trits[:, 128] = 1
    packed = two_bit_codes(trits * scales.repeat(128, axis=1)[:, :200])
    assert packed is not None
    codes, found = packed
    assert codes.shape == (5, 2, 32) and codes.dtype == np.uint8
    assert np.array_equal(found, scales)
    unpacked = (codes[..., None] >> np.array([0, 2, 4, 6]) & 3).reshape(5, 256).astype(int) - 2
    assert np.array_equal(unpacked, np.pad(trits, ((0, 0), (0, 56))))


def test_two_bit_codes_refuse_other_matrices() -> None:
    assert two_bit_codes(np.array([[1.0, -1.0, 0.5]], np.float32)) is None


def test_rows_are_sorted_by_time_and_ratios_are_ours_over_theirs() -> None:
    def figures(milliseconds: float) -> list[dict[str, float]]:
        least = {"batch": 8, "least_ms": milliseconds, "median_ms": 2 * milliseconds}
        return [least | {"max_error": 0.0, "least_cosine": 1.0}]

    times = {"tclip_jax A8": (4.0, 6.0), "PyTorch float32": (8.0, 8.0), "LiteRT int8": (3.0, 2.0)}
    outcome = Outcome(
        {name: [figures(each) for each in both] for name, both in times.items()}, sizes=dict.fromkeys(times, 1)
    )
    rows = rows_of(outcome, [8])
    assert [row["runtime"] for row in rows] == ["LiteRT int8", "tclip_jax A8", "PyTorch float32"]
    assert [row["median_ms"] for row in rows] == [5, 10, 16]
    assert rows[0]["ratios"] == {"tclip_jax A8": {"ratio": 2, "least": 4 / 3, "largest": 3}}
    assert "0.50 (0.50–0.75)" in table(rows)[-1]


def test_a_runtime_that_is_not_installed_is_left_out_and_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "OpenVINO float32"
    monkeypatch.setattr(runtimes, "missing", lambda modules: ["openvino"] if "openvino" in modules else [])
    monkeypatch.setattr(runtimes, "run_apart", lambda *_: '{"artifact": 1}')
    args = argparse.Namespace(
        model="tiny", tower="image", batches=(1,), seconds=0.1, rounds=1, quick=False, runtimes=[]
    )
    outcome = runtimes.measured(tmp_path, [name], args)
    runtimes.print_outcome(outcome, [], args)
    assert capsys.readouterr().out.strip() == (
        f"left out (1): {name}: not installed: openvino (pip install 'tclip-jax[bench]')"
    )


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match="no runtime begins with 'TensorRT'"):
        chosen_names(["TensorRT"])
    assert chosen_names(["OpenVINO"]) == ["OpenVINO float32", "OpenVINO bfloat16", "OpenVINO 2-bit"]


def test_the_cosine_does_not_depend_on_the_lengths_of_embeddings() -> None:
    assert least_cosine(np.array([[3, 4], [0, 2]], np.float32), np.array([[0.6, 0.8], [0, 1]])) == pytest.approx(1)


def test_exports_are_rows_beside_the_first_of_ours() -> None:
    figures = {"median_ms": 9.0, "max_error": 1e-3, "least_cosine": 0.99}
    measured = {name: [[figures | {"least_ms": each}] for each in times] for name, times in DEPLOYED.items()}
    rows = deploy.rows_of(Outcome(rounds=measured))
    assert [(row["runtime"], row["least_ms"], row["over_ours"]) for row in rows] == [
        ("onnx in OpenVINO", 3.0, 0.75),
        ("tclip_jax A8", 4.0, 1.0),
    ]
    assert {RUNTIMES[name].file.partition("/")[0] for name in RUNTIMES} >= set(deploy.EXPORTS)
