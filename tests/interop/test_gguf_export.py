"""Models that GGUF cannot hold, and exports with GGUF files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts.format import write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.export import export_model
from tclip_jax.interop.gguf import read_gguf, verify_gguf, write_gguf
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.ternary import TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

CONFIG = CLIPConfig(
    embed_dim=40,
    vision=VisionConfig(image_size=(32, 32), patch_size=16, width=256, layers=1, mlp_ratio=3.0),
    text=TextConfig(context_length=8, vocab_size=300, width=300, heads=2, layers=1, mlp_ratio=1.0),
)
PIXELS = Preprocess(32)
QKV, FC2 = "image/blocks/attention/qkv/kernel", "image/blocks/mlp/fc2/kernel"


def replaced(params: Params, path: str, leaf: Any) -> Params:
    return unflatten_dict({**flatten_dict(params, sep="/"), path: leaf}, sep="/")


def grouped(params: Params, path: str, group: int, count: int, axis: int = -2) -> Params:
    """Return the parameters with trits of 1 and `count` scales of 1 for each column at `path`."""
    trits: Any = np.ones(flatten(params)[path].shape, np.int8)
    shape = list(trits.shape)
    shape[axis] = count
    scale: Any = np.ones(shape, np.float32)
    return replaced(params, path, TernaryTensor(trits, scale, group, axis))


def scaled(params: Params, path: str, scale: float) -> Params:
    leaf = flatten(params)[path]
    return replaced(params, path, dataclasses.replace(leaf, scale=np.full_like(leaf.scale, scale)))


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    return grouped(random_params(CONFIG), FC2, 256, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: grouped(p, QKV, 128, 2),
            f"{QKV} has groups of 128 along 256 inputs: GGUF has a scale for each 256",
        ),
        (lambda p: grouped(p, FC2, 512, 2), f"{FC2} has groups of 512 along 768 inputs"),
        (lambda p: grouped(p, FC2, 384, 2), f"{FC2} has groups of 384 along 768 inputs"),
        (
            lambda p: grouped(p, "text/token_embedding/embedding", 100, 3),
            "embedding has groups of 100 along 300 inputs",
        ),
        (lambda p: grouped(p, "image/projection/kernel", 40, 1, -1), "groups of 40 along 40 inputs"),
        (lambda p: scaled(p, FC2, 0.1), f"{FC2}: scale 0.100000001 is not exact in float16"),
        (lambda p: scaled(p, FC2, np.nan), f"{FC2}: scale nan is not exact in float16"),
        (lambda p: scaled(p, FC2, -1.0), f"{FC2}: a scale is negative"),
        (lambda p: scaled(p, FC2, 0.0), f"{FC2}: a scale is 0 for nonzero trits"),
        (lambda p: p | {"logit_scale": np.float32(np.nan)}, "logit_scale holds NaN"),
        (lambda p: p | {"more": np.zeros(1)}, "the parameter tree does not fit the model: unexpected more"),
        (lambda p: p | {"logit_scale": np.zeros(2)}, r"logit_scale has shape \(2,\): the model's is \(\)"),
        (
            lambda p: unflatten_dict({k: np.zeros(np.shape(v)) for k, v in flatten(p).items()}, sep="/"),
            "no parameter is ternary",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_not_written(
    change: Callable[[Params], Params], message: str, params: Params, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=change(params), kind="tq1_0")
    assert not list(tmp_path.iterdir())


def test_one_scale_a_column_is_written_whatever_its_group_is_called(params: Params, tmp_path: pathlib.Path) -> None:
    """A column with one scale is written whatever its group size is."""
    changed = grouped(params, QKV, 256, 1)
    write_gguf(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=changed, kind="tq1_0")
    verify_gguf(tmp_path / "out", changed)


def test_a_ternary_patch_embedding_is_written_as_floats(params: Params, tmp_path: pathlib.Path) -> None:
    trits: Any = np.random.default_rng(0).integers(-1, 2, (16 * 16 * 3, 256), np.int8)
    scale: Any = np.full((1, 256), 0.1, np.float32)
    leaf = TernaryTensor(trits, scale, len(trits))
    changed = replaced(params, "image/patch_embedding/kernel", leaf)
    write_gguf(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=changed, kind="tq1_0")
    verify_gguf(tmp_path / "out", changed)
    stored = read_gguf(tmp_path / "out")[2]["image"]["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(stored, np.reshape(leaf.dequantize(), (16, 16, 3, 256)))


def test_export_has_each_format_that_was_asked_for(params: Params, tmp_path: pathlib.Path) -> None:
    formats = ("open_clip", "gguf-tq1_0", "gguf-tq2_0")
    out = tmp_path / "release"
    export_model(out, config=CONFIG, preprocess=PIXELS, params=params, formats=formats)
    names = {path.name for path in out.iterdir()}
    assert {"release-tq1_0.gguf", "release-tq2_0.gguf", "open_clip_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json", "preprocessor_config.json"} & names
    for kind in ("tq1_0", "tq2_0"):
        verify_gguf(out / f"release-{kind}.gguf", params)
    card = (out / "README.md").read_text()
    assert "read_gguf" in card and "open_clip.create_model" in card and "CLIPModel" not in card


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (
            ("coreml",),
            "format 'coreml' is not one of open_clip, hf, big_vision, onnx, onnx-fp32, onnx-fp16, litert, stablehlo,"
            " torch, gguf-tq1_0, gguf-tq2_0",
        ),
        (("open_clip", "gguf-tq1_0"), "128"),
    ],
)
def test_an_export_that_fails_leaves_nothing(
    formats: tuple[str, ...], message: str, params: Params, tmp_path: pathlib.Path
) -> None:
    broken = grouped(params, QKV, 128, 2)
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=broken, formats=formats)
    assert not list(tmp_path.iterdir())


def test_the_command(params: Params, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    write_artifact(packed, config=CONFIG, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    assert main(["export", str(packed), "--to", "gguf-tq1_0", "--out", str(tmp_path / "out")]) == 0
    verify_gguf(tmp_path / "out" / "out-tq1_0.gguf", params)
    assert main(["export", str(packed), "--to", "hf,gguf", "--out", str(tmp_path / "no")]) == 2
    assert "format 'gguf' is not one of" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
