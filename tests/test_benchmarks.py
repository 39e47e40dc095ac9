"""Every benchmark runs: its --quick ends with one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from benchmarks import accuracy, accuracy_data, deploy, runtimes
from benchmarks.accuracy_results import Kept, summarize
from benchmarks.deploy_runtimes import RUNTIMES
from benchmarks.gradient_dtype import product_on
from benchmarks.peer_files import two_bit_codes
from benchmarks.peers import least_cosine
from benchmarks.runtimes import Outcome, chosen_names, rows_of, table
from tclip_jax.runs import config as runs_config
from tclip_jax.runs.config import base_config

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
    head, _, first, ours, _ = runtimes.markdown(rows, "image")
    assert head == "| runtime | MB | 8 images, ms | A8 / it | least cosine |"
    assert first == "| LiteRT int8 | 0.0 | 2 | 2.00 (1.33–3.00) | 1.000000 |"
    assert ours.startswith("| **tclip_jax A8** | 0.0 | 4 | 1.00")


def test_a_runtime_that_is_not_installed_is_left_out_and_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "OpenVINO float32"
    monkeypatch.setattr(runtimes, "missing", lambda modules: ["openvino"] if "openvino" in modules else [])
    monkeypatch.setattr(runtimes, "run_apart", lambda *_: '{"artifact": 1}')
    args = argparse.Namespace(
        model="tiny", tower="image", batches=(1,), seconds=0.1, rounds=1, quick=False, runtimes=[], markdown=False
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


def test_kept_results_are_found_by_what_made_them_and_merge(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "results" / "accuracy.json"
    ours, theirs = Kept(path), Kept(path)
    ours.add({"variant": "full", "seed": 1}, {"config": "a"}, {"accuracy": 0.5})
    theirs.add({"variant": "full", "seed": 0}, {"config": "b"}, {"failed": "step 3: loss is nan"})
    again = Kept(path)
    assert again.find({"config": "a"}) == {"accuracy": 0.5} and again.find({"config": "c"}) is None
    assert again.find({"config": "b"}) == {"failed": "step 3: loss is nan"}
    assert [entry["seed"] for entry in json.loads(path.read_text())["results"]] == [0, 1]
    path.write_text('{"results": [1]}')
    with pytest.raises(ValueError, match=r"accuracy.json: not a file of results: TypeError"):
        Kept(path)


def test_seeds_are_a_number_or_a_range_and_variants_are_checked() -> None:
    assert accuracy.seeds("3") == [0, 1, 2] and accuracy.seeds("10-12") == [10, 11, 12]
    for text in ("0", "5-3", "-1", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no range of seeds"):
            accuracy.seeds(text)
    with pytest.raises(argparse.ArgumentTypeError, match="'sft' is no method of ternaryclip"):
        accuracy.variant("ternaryclip+sft")


def test_a_new_key_with_its_default_changes_no_digest_of_kept_results(monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(out="o", choose=False, siglip=False, quick=False, width=0, steps=1000)
    config = accuracy.recipe(args, "cifar10", "ternaryclip+soft+x4", True)
    assert (config.steps, config.ternary_warmup_steps, config.ternary_anneal_steps) == (1000, 200, 700)
    before = accuracy._changed(config)
    assert "optimizer.b1" not in before and before["optimizer.warmup_steps"] == 50
    config.optimizer.b1 = 0.5
    assert accuracy._changed(config) == before | {"optimizer.b1": 0.5}

    def with_a_new_key() -> ml_collections.ConfigDict:
        newer = base_config()
        newer.optimizer.new_key = 1.0
        return newer

    for module in (accuracy, runs_config):
        monkeypatch.setattr(module, "base_config", with_a_new_key)
    newer = accuracy.recipe(args, "cifar10", "ternaryclip+soft+x4", True)
    assert newer.optimizer.new_key == 1 and accuracy._changed(newer) == before
    newer.optimizer.new_key = 2.0
    assert accuracy._changed(newer) == before | {"optimizer.new_key": 2.0}


@pytest.fixture
def trained(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Experiments that train nothing: the name, initial weights and teacher of each run that they would train."""
    runs: list[dict[str, str]] = []

    def train(config: Any, workdir: pathlib.Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        paths = {"init": config.init, "teacher": config.teacher, "cache": config.data.teacher_cache}
        runs.append({"run": workdir.name} | {name: path and pathlib.Path(path).name for name, path in paths.items()})

    changes: dict[str, Any] = {"train": train, "prepare_teacher": lambda *_: None, "_contents": lambda *_: {}}
    changes["evaluated"] = lambda *_, **__: {"accuracy": 0.5}
    changes["TeacherCache"] = types.SimpleNamespace(open=lambda _: types.SimpleNamespace(made_by={}))
    for name, value in changes.items():
        monkeypatch.setattr(accuracy, name, value)
    return runs


def options(out: pathlib.Path) -> argparse.Namespace:
    return argparse.Namespace(out=str(out), choose=False, siglip=False, quick=False, width=0, steps=1000)


def test_pretraining_uses_the_teacher_as_the_student_does_and_counts_once(
    trained: list[dict[str, str]], tmp_path: pathlib.Path
) -> None:
    def run(who: str, distilled: bool = True) -> dict[str, Any]:
        trained.clear()
        return accuracy.experiment(options(tmp_path), "cifar10", who, distilled, 3)

    assert run("full+pretrained+in_step+x4")["cpu_seconds"] >= 0
    first, last = "full+in_step+x4-distilled-3", "full+pretrained+in_step+x4-distilled-3"
    assert trained == [
        {"run": first, "init": "", "teacher": "teacher", "cache": ""},
        {"run": last, "init": first, "teacher": "teacher", "cache": ""},
    ]
    assert run("ternaryclip+pretrained+in_step+x4")["cpu_seconds"] is None  # pretrained before
    assert run("full+in_step+x4")["cpu_seconds"] is None
    assert run("ternaryclip+pretrained")["cpu_seconds"] is not None
    assert [each["cache"] for each in trained] == ["cache", "cache"] and not any(each["teacher"] for each in trained)
    run("ternaryclip+pretrained", distilled=False)
    assert [each["cache"] + each["teacher"] for each in trained] == ["", ""]
    (tmp_path / "cifar10-steps1000" / "runs" / "ternaryclip+x2-distilled-3").mkdir()
    assert run("ternaryclip+x2")["cpu_seconds"] is None and len(trained) == 1  # resumed
    run("ternaryclip+x2")
    assert trained == []  # stored


def test_pretraining_that_does_not_converge_is_recorded(
    trained: list[dict[str, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, workdir: pathlib.Path) -> None:
        raise ValueError(f"{workdir.name}: 10 skipped steps in a row")

    monkeypatch.setattr(accuracy, "train", train)
    result = accuracy.experiment(options(tmp_path), "cifar10", "ternaryclip+pretrained", True, 0)
    assert result == {"failed": "full-distilled-0: 10 skipped steps in a row"}


def test_kept_results_are_keyed_by_copies_and_pretraining_and_not_by_the_commit(
    trained: list[dict[str, str]], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries() -> dict[str, Any]:
        trained.clear()
        kept = Kept(tmp_path / "kept.json")
        for who, distilled in (
            ("ternaryclip", True), ("ternaryclip+pretrained", True), ("full+in_step", True), ("full", False)
        ):  # fmt: skip
            accuracy.experiment(options(tmp_path / "runs"), "cifar10", who, distilled, 0, kept)
        return {entry["variant"]: entry for entry in json.loads((tmp_path / "kept.json").read_text())["results"]}

    monkeypatch.setattr(accuracy, "software", lambda: {"tclip_jax": "0.1.0", "commit": "a"})
    first = entries()
    common = {"config", "teacher", "data", "version"}
    assert {who: set(entry["made_by"]) - common for who, entry in first.items()} == {
        "ternaryclip": {"copies"}, "ternaryclip+pretrained": {"copies", "pretraining"},
        "full+in_step": {"in_the_step"}, "full": set(),
    }  # fmt: skip
    assert {entry["commit"] for entry in first.values()} == {"a"} and first["ternaryclip"]["made_by"]["copies"] == 4
    monkeypatch.setattr(accuracy, "software", lambda: {"tclip_jax": "0.1.0", "commit": "b"})
    assert entries() == first and trained == []
    monkeypatch.setattr(accuracy, "COPIES", {"cifar10": 2})
    with pytest.raises(ValueError, match=r"made from other inputs \(copies: 4, not 2\)"):
        entries()


def test_differences_are_to_full_precision_with_the_same_methods() -> None:
    def results(*values: float) -> list[dict[str, float]]:
        shares = ("share", "share without embedding", "zeros", "zeros without embedding")
        return [dict.fromkeys(shares, 0.5) | {"accuracy": value} for value in values]

    every = {
        ("full", True): results(0.9, 0.9),
        ("full+x2", True): results(0.5, 0.7),
        ("ternaryclip+soft+x2", True): results(0.4, 0.5),
    }
    (row,) = summarize("cifar10", "ternaryclip+soft+x2", True, every, "full")
    assert row["difference"] == pytest.approx(-0.15) and row["seeds"] == 2
    every["ternaryclip+added+x2", True] = every["full+added", True] = results(0.6, 0.6)
    for who in ("ternaryclip+added+x2", "full+x2", "full+added"):  # without a peer, or full precision itself
        (row,) = summarize("cifar10", who, True, every, "full")
        assert np.isnan(row["difference"]) and row["mean"] == pytest.approx(0.6)
    (row,) = summarize("cifar10", "full+x2", True, every, "ternaryclip+soft+x2")
    assert row["difference"] == pytest.approx(0.15)


def test_held_out_images_are_training_images(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{split}/{i:04}.jpg" for split in ("train/dog", "test/dog") for i in (0, 3999, 4000, 4999)]
    monkeypatch.setattr(
        accuracy_data, "_members", lambda archive: ((name, name.encode()) for name in ["README.md", *names])
    )
    made = dict(accuracy_data._cifar10(tmp_path, 10**6, True))
    assert made == {
        "train/dog/0000.jpg": b"train/dog/0000.jpg",
        "train/dog/3999.jpg": b"train/dog/3999.jpg",
        "test/dog/4000.jpg": b"train/dog/4000.jpg",
        "test/dog/4999.jpg": b"train/dog/4999.jpg",
    }


def test_simulated_devices_round_their_sums_and_each_addition() -> None:
    """Parts of 1 + 2⁻⁹ round to 1; 256 + 1 rounds to 256, the even neighbour in bfloat16."""
    x = np.float32([1, 2**-9, 256, 0, 1, 0]).reshape(3, 2, 1)
    for devices, expected in ((3, 256), (1, 258)):  # 258.002 rounds to 258
        gradient = jax.vjp(lambda w, n=devices: product_on(n)(x, w, jnp.bfloat16), jnp.ones((1, 1)))[1]
        np.testing.assert_array_equal(gradient(jnp.ones((3, 2, 1)))[0], [[expected]])
