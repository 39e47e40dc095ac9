"""`tclip import`: its options, its report and its errors."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.artifacts import read_artifact
from tclip_jax.cli import main
from tclip_jax.interop.open_clip import open_clip_table
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE

MODEL_CFG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """Writes an open_clip folder; in the image tower mlp/fc2 is ternary, with groups of 64 inputs."""
    rng = np.random.default_rng(0)
    state = {
        entry.key: rng.random(entry.shape, np.float32)
        for entry in open_clip_table(CLIPConfig.from_open_clip(MODEL_CFG))
    }
    for layer in range(2):
        scale = np.repeat(rng.integers(128, 256, (64, 4)) / 2**12, 64, 1)
        state[f"visual.transformer.resblocks.{layer}.mlp.c_proj.weight"] = np.float32(
            rng.integers(-1, 2, (64, 256)) * scale
        )
    folder = tmp_path / "source"
    folder.mkdir()
    safetensors.numpy.save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL_CFG}))
    return folder


def test_import_prints_the_ternary_parameters(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["import", str(source), "--out", str(out)]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["image/blocks/mlp/fc2/kernel"][1:3] == ["64", "8"]
    assert lines["image/blocks/mlp/fc1/kernel"][1:5] == ["float:", "layer", "0,", "inputs"]
    own = [path for path in TERNARIZABLE if "/pool/" not in path]  # which only a SigLIP has
    assert len(lines) == 1 + len(own) + 1 and lines[f"{out}:"][2:] == [
        "bytes",
        "of",
        "weights",
    ]
    kernel = read_artifact(out).params["image"]["blocks"]["mlp"]["fc2"]["kernel"]
    assert (kernel.group, kernel.scale.shape) == (64, (2, 4, 64))


def test_the_options_of_import(
    source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.json").write_text(json.dumps(MODEL_CFG))
    out, file = str(tmp_path / "out"), str(source / "open_clip_model.safetensors")
    arguments = ["import", file, "--out", out, "--model-cfg", str(tmp_path / "model.json")]
    assert main([*arguments, "--ternary", "no", "--dtype", "float16", "--image-size", "24"]) == 0
    assert capsys.readouterr().out.startswith("float weights: --ternary no\n")
    artifact = read_artifact(out)
    assert artifact.config.vision.image_size == (24, 24)
    assert artifact.manifest["tensors"]["image/projection/kernel"]["dtype"] == "float16"
    assert main(arguments) == 2 and main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "ViT-B-16"], "source: its embed_dim is 8, but the given model's is 512"),
        (["--preset", "ViT-B-17"], "the nearest is 'ViT-B-16'"),
        (["--image-size", "7"], "image size 7 is smaller than patch size 8"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_files(
    options: list[str],
    message: str,
    source: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["import", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tclip import: error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
