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
from tclip_jax.interop.export import export_model
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
    export_model(path / "export", **same, params=params)
    write_artifact(path / "artifact", **same, params=params, rules=(), rest_dtype="float32")
    params["text"]["blocks"]["mlp"]["fc1"]["kernel"][0] *= 1.01
    write_artifact(path / "other", **same, params=params, rules=(), rest_dtype="float32")
    return path


def test_weights(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, other = str(folder / "artifact"), str(folder / "other")
    assert main(["compare", "weights", artifact, artifact]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["PASS: 0 of 50 tensors over budget 0, 0 trit flips"]
    assert main(["compare", "weights", other, artifact]) == 1
    assert "farthest apart: text/blocks/0/mlp/fc1/kernel" in capsys.readouterr().out
    assert main(["compare", "weights", other, artifact, "--budget", "0.02"]) == 0


def test_activations_in_jax(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "activations", str(folder / "other"), str(folder / "artifact"), "--json"]
    assert main([*arguments, "--html", str(folder / "page.html")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first"] == {"text": "text/blocks/0/mlp"} and report["configurations"] == {}
    assert report["guess"].startswith("the weights of text/blocks/0/mlp") and report["passed"] is False
    assert report["verdict"][0].startswith("first over budget 2e-05: text/blocks/0/mlp (")
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


@pytest.mark.slow
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
    done = subprocess.run([sys.executable, "-c", check, *paths], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[0, 1]\n") and "reference run by: open_clip on PyTorch" in done.stdout


@pytest.fixture
def transformers_folder(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The export as `CLIPModel.save_pretrained` writes it: no preprocessor."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / "export" / name).read_bytes())
    return tmp_path


def state(path: pathlib.Path, **changes: object) -> None:
    """Changes both towers in a config.json of transformers."""
    document = json.loads((path / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        document[tower] |= changes
    (path / "config.json").write_text(json.dumps(document))


@pytest.mark.parametrize("via", [pytest.param("torch", marks=[pytest.mark.torch, pytest.mark.slow]), "jax"])
def test_a_folder_of_transformers_without_a_preprocessor(
    via: str,
    folder: pathlib.Path,
    transformers_folder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = ["compare", "activations", str(folder / "artifact"), str(transformers_folder), "--via", via]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("PASS: 19 taps within budget 2e-05; the largest error is at ") and len(lines) < 8
    assert [line for line in caplog.messages if "assuming" in line] == [
        f"{transformers_folder} has no preprocessor_config.json: assuming CLIP's preprocessing: bicubic resize of the"
        " shorter side and center crop to 16x16, mean (0.48145466, 0.4578275, 0.40821073), std (0.26862954, 0.26130258,"
        " 0.27577711)"
    ]
    state(transformers_folder, hidden_act="quick_gelu")
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "quick_gelu: ours false, reference true"
    assert lines[-2].startswith("FAIL: first over budget 2e-05: image/blocks/0/mlp (")
    assert lines[-1] == "  guess: the activation of the MLPs: the reference has quick_gelu true"
    assert main([*arguments, "--all"]) == 1
    assert capsys.readouterr().out.count("  over\n") > 4
    assert main([*arguments, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["configurations"] == {"quick_gelu": {"ours": False, "reference": True}}
    assert report["first"]["text"] == "text/blocks/0/mlp" and report["guess"].endswith("quick_gelu true")


@pytest.mark.torch
@pytest.mark.slow
def test_a_reference_that_only_its_library_reads(
    folder: pathlib.Path, transformers_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state(transformers_folder, layer_norm_eps=1e-3)
    arguments = ["compare", "activations", str(folder / "artifact"), str(transformers_folder)]
    assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-2] == [f"{tower}.norm_eps: ours 1e-05, reference 0.001" for tower in ("text", "vision")]
    assert lines[-1] == "  guess: the epsilon of the LayerNorms: the reference has 0.001, ours is 1e-05"
    (transformers_folder / "preprocessor_config.json").write_text('{"do_resize": false}')
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "reference configuration: not compared: " in shown and "do_resize is false: it must be true" in shown
    assert "guess: the epsilon of the LayerNorms: the reference has 0.001" in shown
    state(transformers_folder, layer_norm_eps=1e-5)
    assert main(arguments) == 1  # every tap is within the budget, but its files are not understood
    assert "the reference's configuration is not compared" in capsys.readouterr().out


@pytest.mark.torch
def test_models_of_other_shapes_fail_by_their_configurations(
    folder: pathlib.Path, transformers_folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((transformers_folder / "config.json").read_text())
    document["text_config"]["num_hidden_layers"] = 1
    (transformers_folder / "config.json").write_text(json.dumps(document))
    arguments = [str(folder / "artifact"), str(transformers_folder)]
    page = transformers_folder / "page.html"
    # Only the library reads weights of more layers than the configuration has.
    assert main(["compare", "activations", *arguments, "--html", str(page)]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "text.layers: ours 2, reference 1",
        "FAIL: the models have different shapes, so no activation can be compared",
    ]
    assert "FAIL: the models have different shapes" in page.read_text()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_inputs(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "inputs", str(folder / "artifact")]) == 0
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "PASS: 4 of 4 kinds of input are equal",
        "  open_clip tokens: 50 compared, 0 differ",
    ]


def test_an_error_is_one_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "golden", "check", str(folder / "artifact"), str(folder / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tclip compare: error: {folder}/none: no such file") and error.count("\n") == 1
    assert main(["compare", "weights", str(folder), str(folder)]) == 2
