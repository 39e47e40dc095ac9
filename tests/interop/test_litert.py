"""LiteRT files: trits and scales to the bit, what cannot be written, damaged files, and the folder of an export."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop import litert_flatbuffer
from tclip_jax.interop.export import export_model
from tclip_jax.interop.litert import read_metadata, rounding_note, verify_embeddings, verify_litert, write_litert
from tclip_jax.interop.litert_flatbuffer import Flatbuffer
from tclip_jax.interop.litert_integers import Integers, decode_integers
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

CONFIG = CLIPConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=64, layers=2, head_width=32),
    text=TextConfig(context_length=8, vocab_size=60, width=64, heads=2, layers=1),
)
PIXELS = Preprocess(16)
FC1 = "image/blocks/mlp/fc1/kernel"
TABLE = "text/token_embedding/embedding"
needs_converter = pytest.mark.skipif(
    importlib.util.find_spec("litert_converter") is None,
    reason="litert-converter is not installed (pip install -e '.[litert]')",
)


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    return pack_params(random_params(CONFIG), ternary_rules("Q-ALL", Quantizer(group=32)))


@pytest.fixture(scope="module")
def written(params: Params, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("litert")
    write(folder, params)
    return folder


def write(folder: pathlib.Path, params: Params, batch: int = 1) -> None:
    write_litert(folder, config=CONFIG, preprocess=PIXELS, params=params, batch=batch)


def changed(params: Params, path: str, **changes: Any) -> Params:
    leaves = flatten_dict(params, sep="/")
    return unflatten_dict({**leaves, path: dataclasses.replace(leaves[path], **changes)}, sep="/")


@needs_converter
def test_files_have_the_same_trits_and_describe_themselves(
    params: Params, written: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    verify_litert(written, params)
    assert {path.name for path in written.iterdir()} == {"image.tflite", "text.tflite"}
    for path in written.iterdir():
        metadata, logit_scale = read_metadata(path)
        assert (metadata.config, metadata.preprocess) == (CONFIG, PIXELS)
        assert logit_scale == pytest.approx(float(np.exp(params["logit_scale"])))
    weight = flatten_dict(params, sep="/")[FC1]
    matrix = Flatbuffer(written / "image.tflite").matrix("image/blocks/1/mlp/fc1/kernel")
    assert isinstance(matrix, Integers) and matrix.block == 32
    trits, scale = decode_integers(matrix)
    np.testing.assert_array_equal((trits * scale).T, weight.dequantize()[1])
    projection = Flatbuffer(written / "text.tflite").matrix("text/projection/kernel")
    np.testing.assert_array_equal(projection, params["text"]["projection"]["kernel"].T)
    write(tmp_path, params)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (written / path.name).read_bytes()


@needs_converter
def test_every_buffer_is_aligned(written: pathlib.Path) -> None:
    content = (written / "image.tflite").read_bytes()
    model = importlib.import_module("litert_converter.schema_py_generated").Model.GetRootAs(content, 0)
    start = np.frombuffer(content, np.uint8).ctypes.data
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    places = [each.DataAsNumpy().ctypes.data - start for each in buffers if each.DataLength()]
    assert len(places) > 20 and all(place % 16 == 0 for place in places)


@needs_converter
def test_a_file_that_differs_is_detected(params: Params, written: pathlib.Path) -> None:
    leaf = flatten_dict(params, sep="/")[FC1]
    for change in ({"trits": -leaf.trits}, {"scale": leaf.scale * np.float32(1.0000001)}):
        with pytest.raises(ValueError, match=r"image.tflite: image/blocks/0/mlp/fc1/kernel differs"):
            verify_litert(written, changed(params, FC1, **change))
    other = unflatten_dict(
        {**flatten_dict(params, sep="/"), "text/projection/kernel": np.ones((64, 24), np.float32)}, sep="/"
    )
    with pytest.raises(ValueError, match=r"text.tflite: text/projection/kernel differs"):
        verify_litert(written, other)


@needs_converter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: changed(p, FC1, scale=np.ones((2, 4, 256), np.float32), group=16),
            "image/blocks/0/mlp/fc1/kernel has groups of 16 along 64 inputs: LiteRT has INT4 products for blocks of a",
        ),
        (
            lambda p: changed(p, TABLE, scale=np.full((60, 2), 0.1, np.float32)),
            f"{TABLE}: scale 0.100000001 is not a positive float16",
        ),
        (lambda p: p | {"more": np.zeros(1)}, "the parameter tree does not fit the model: unexpected more"),
        (
            lambda p: unflatten_dict(
                {**flatten_dict(p, sep="/"), "image/position_embedding": np.full((5, 64), 1e39)}, sep="/"
            ),
            "image/position_embedding is not finite in float32",
        ),
        (
            lambda p: unflatten_dict(
                {
                    path: leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf
                    for path, leaf in flatten_dict(p, sep="/").items()
                },
                sep="/",
            ),
            "no parameter is quantized: litert packs trits and integers",
        ),
    ],
)
def test_what_litert_cannot_hold_is_not_written(
    change: Callable[[Params], Params], message: str, params: Params, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, change(params))
    assert not list(tmp_path.iterdir())


@needs_converter
def test_a_tower_of_more_than_2_gib_is_refused(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litert_flatbuffer, "_MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"the image tower: [\d,]+ bytes of weights: a LiteRT file holds 10,000"):
        write(tmp_path, params)
    assert not list(tmp_path.iterdir())


@needs_converter
def test_a_converter_that_fails_is_one_line(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.stages.Lowered.as_text", lambda self: "module { nonsense }")
    with pytest.raises(ValueError, match=r"^litert-converter [\d.]+ cannot convert the image tower: ") as error:
        write(tmp_path, params)
    assert str(error.value).isprintable() and not list(tmp_path.iterdir())


@needs_converter
def test_a_damaged_or_foreign_file_is_one_line(params: Params, written: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path, whole = tmp_path / "image.tflite", (written / "image.tflite").read_bytes()
    for content in (b"", b"not LiteRT", whole[:1000], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} is not a LiteRT file, or a damaged one: "):
            read_metadata(path)
    path.write_bytes(whole.replace(b"tclip_jax", b"other_jax"))
    with pytest.raises(ValueError, match="does not state a model of tclip_jax"):
        read_metadata(path)
    name = b"image/blocks/0/mlp/fc1/kernel"
    path.write_bytes(whole.replace(name, name.replace(b"fc1", b"fc9")))
    message = (
        "the list of packed weights does not fit the model: missing image/blocks/0/mlp/fc1/kernel; unexpected image"
    )
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        verify_litert(tmp_path, params)
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / "none.tflite")


@needs_converter
def test_scales_that_litert_rounds_are_named(random_params: Draw, tmp_path: pathlib.Path) -> None:
    more = pack_params(random_params(CONFIG), ternary_rules("Q-FFN", Quantizer(kind="twn", group=32, scale_bits=11)))
    write(tmp_path, more)
    verify_litert(tmp_path, more)
    (note,) = rounding_note(tmp_path)
    assert note.startswith("6 weights, such as image/blocks/0/mlp/fc1/kernel, have scales of more than 8 significant")


def test_without_the_converter_the_extra_is_named(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"written by litert-converter: pip install 'tclip-jax\[litert\]'"):
        export_model(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=params, formats=["litert"])
    (tmp_path / "image.tflite").write_bytes(b"")
    with pytest.raises(ValueError, match=r"LiteRT files need pip install 'tclip-jax\[litert\]'"):
        read_metadata(tmp_path / "image.tflite")
    unused: Any = None
    line = verify_embeddings(tmp_path, unused)
    assert line.endswith("not run, because ai-edge-litert is not installed; trits and scales were read back")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.4.0", "litert-converter 0.4.0 is too old: install 0.5.0"),
        ("1.3.0", "ai-edge-litert 1.3.0 ignores the scales"),
    ],
)
def test_packages_that_are_too_old_are_refused(
    version: str, message: str, params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = version == "1.3.0"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if runtime else None)
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=params, formats=["litert"])
    assert not (tmp_path / "out").exists()


@needs_converter
def test_the_command(params: Params, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    write_artifact(artifact, config=CONFIG, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), "--to", "litert", "--batch", "2", "--out", str(out)]) == 0
    shown = capfd.readouterr().out
    assert f"{out}/litert/image.tflite  0.1 MB  ai-edge-litert 1.4 or newer" in shown
    assert "image.tflite and text.tflite: " in shown
    card = (out / "README.md").read_text()
    assert "tags: [clip, ternary, litert]" in card and "FOLDER/litert/image.tflite" in card
    (out / "litert" / "image.tflite").write_bytes(b"cut")
    assert main(["compare", "activations", str(artifact), str(out / "litert")]) == 2
    assert "is not a LiteRT file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--to", "onnx", "--batch", "2"],
            "--batch is for litert, and --to is onnx: the other formats take any number",
        ),
        (
            ["--to", "litert", "--dtype", "float16"],
            "--dtype is for open_clip, hf, big_vision, onnx, and --to is litert",
        ),
    ],
)
def test_options_that_the_format_does_not_take(
    options: list[str], message: str, params: Params, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    write_artifact(artifact, config=CONFIG, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
