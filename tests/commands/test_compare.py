"""`tclip compare`: exit codes, formats of the report, and golden files without PyTorch."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.export import export_pytorch
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Writes `artifact`, `export` (the same model for PyTorch) and `other`, in which one text layer is scaled."""
    path = tmp_path_factory.mktemp("compare")
    vision = VisionConfig(image_size=(16, 16), patch_size=8, width=16, layers=1, head_width=8)
    config = CLIPConfig(8, vision, TextConfig(context_length=8, width=16, heads=2, layers=2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.5, 0.2, leaf.shape).astype(np.float32), param_shapes(config))
    same = {"config": config, "preprocess": Preprocess(16)}
    export_pytorch(path / "export", **same, params=params)
    write_artifact(path / "artifact", **same, params=params, rules=(), rest_dtype="float32")
    params["text"]["blocks"]["mlp"]["fc1"]["kernel"][0] *= 1.01
    write_artifact(path / "other", **same, params=params, rules=(), rest_dtype="float32")
    return path


def test_weights(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, other = str(folder / "artifact"), str(folder / "other")
    assert main(["compare", "weights", artifact, artifact]) == 0
    assert "0 of 50 tensors over budget 0, 0 trit flips" in capsys.readouterr().out
    assert main(["compare", "weights", other, artifact]) == 1
    assert "farthest apart: text/blocks/0/mlp/fc1/kernel" in capsys.readouterr().out
    assert main(["compare", "weights", other, artifact, "--budget", "0.02"]) == 0


def test_activations_in_jax(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "activations", str(folder / "other"), str(folder / "artifact"), "--json"]
    assert main([*arguments, "--html", str(folder / "page.html")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"][:2] == [
        "image tower, first tap over budget 2e-05: none",
        "text tower, first tap over budget 2e-05: text/blocks/0/mlp",
    ]
    assert report["facts"]["ours"].endswith("float32, precision highest")
    assert (folder / "page.html").read_text().startswith("<!doctype html>")
    assert main([*arguments, "--budget", "0.1"]) == 0


@pytest.mark.torch
def test_the_folder_of_pytorch_is_the_reference_in_either_position(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "activations", str(folder / "export"), str(folder / "artifact")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"activations of {folder / 'artifact'} against {folder / 'export'}\n")
    assert "reference run by: open_clip on PyTorch" in shown and "reference TF32: " in shown


@pytest.mark.torch
def test_golden_file_of_pytorch_is_checked_without_it(folder: pathlib.Path) -> None:
    golden = str(folder / "golden")
    assert main(["compare", "golden", "dump", str(folder / "artifact"), golden, "--via", "torch", "--batch", "2"]) == 0
    check = (
        "import sys; from tclip_jax.cli import main; codes = [main(['compare', 'golden', 'check', path, sys.argv[3]])"
        " for path in sys.argv[1:3]]; assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules);"
        " print(codes)"
    )
    paths = [str(folder / "artifact"), str(folder / "other"), golden]
    done = subprocess.run([sys.executable, "-c", check, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[0, 1]\n") and "reference run by: open_clip on PyTorch" in done.stdout


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_inputs(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "inputs", str(folder / "artifact")]) == 0
    assert "open_clip tokens: 50 compared, 0 differ" in capsys.readouterr().out


def test_an_error_is_one_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "golden", "check", str(folder / "artifact"), str(folder / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tclip compare: error: {folder}/none: no such file") and error.count("\n") == 1
    assert main(["compare", "weights", str(folder), str(folder)]) == 2
