"""ONNX files: trits and scales to the bit, what cannot be written, damaged files, and the folder of an export."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.interop import onnx as interop_onnx
from tclip_jax.interop.export import export_model
from tclip_jax.interop.onnx import parse_onnx, read_metadata, read_quantized, verify_embeddings, verify_onnx, write_onnx
from tclip_jax.interop.onnx_blocks import BLOCKS, decode_blocks, encode_blocks, find_block
from tclip_jax.interop.onnx_graph import Form
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor
from tests.interop.model_shapes import ternary

onnx = pytest.importorskip("onnx", reason="the onnx package is not installed (pip install -e '.[onnx]')")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install -e '.[onnx]')")

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

CONFIG = CLIPConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=64, layers=2, head_width=32),
    text=TextConfig(context_length=8, vocab_size=60, width=32, heads=2, layers=1),
)
PIXELS = Preprocess(16)
PACKED = Form()
FC1 = "image/blocks/mlp/fc1/kernel"


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    return pack_params(random_params(CONFIG), ternary_rules("Q-ALL", Quantizer()))


def write(folder: pathlib.Path, params: Params, form: Form = PACKED) -> None:
    write_onnx(folder, config=CONFIG, preprocess=PIXELS, params=params, form=form)


def changed(params: Params, path: str, **changes: Any) -> Params:
    leaves = flatten_dict(params, sep="/")
    return unflatten_dict({**leaves, path: dataclasses.replace(leaves[path], **changes)}, sep="/")


@settings(max_examples=60)
@given(
    length=st.integers(1, 700),
    outputs=st.integers(1, 5),
    group=st.sampled_from([32, 64, 96, 128, 256, 384, 512, 1000]),
    axis=st.sampled_from([-2, -1]),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 99),
)
def test_blocks_hold_every_trit_and_scale(
    length: int, outputs: int, group: int, axis: int, dtype: str, seed: int
) -> None:
    group = min(group, length)
    shape = (length, outputs) if axis == -2 else (outputs, length)
    weight = ternary(shape, group, axis, seed)
    path = FC1 if axis == -2 else "text/token_embedding/embedding"
    if weight.scale.shape[axis] > 1 and group % 32:
        with pytest.raises(ValueError, match=f"{path} has groups of {group} along {length} inputs"):
            encode_blocks(path, weight, dtype)
        return
    blocks = encode_blocks(path, weight, dtype)
    assert blocks.block in BLOCKS and blocks.codes.nbytes < length * outputs / 4 + 32 * outputs
    trits, scale = decode_blocks(blocks)
    first = trits.T if axis == -2 else trits
    np.testing.assert_array_equal(first, weight.trits)
    np.testing.assert_array_equal((trits * scale).T if axis == -2 else trits * scale, weight.dequantize())


@pytest.mark.parametrize(
    ("length", "group", "block"), [(768, 256, 128), (768, 64, 64), (768, 96, 32), (64, 64, 64), (20, 20, 32)]
)
def test_the_largest_block_that_fits(length: int, group: int, block: int) -> None:
    assert find_block(FC1, ternary((length, 3), group)) == block


@pytest.mark.parametrize("form", [Form(), Form(accuracy_level=1), Form(dtype="float16")])
def test_files_have_the_same_trits_and_describe_themselves(form: Form, params: Params, tmp_path: pathlib.Path) -> None:
    write(tmp_path, params, form)
    verify_onnx(tmp_path, CONFIG, params, form)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}_model{form.suffix}.onnx" for name in ("vision", "text")
    }
    for name, ends in (("vision", ("pixel_values",)), ("text", ("input_ids", "attention_mask"))):
        path = tmp_path / f"{name}_model{form.suffix}.onnx"
        metadata, logit_scale = read_metadata(path)
        assert (metadata.config, metadata.preprocess) == (CONFIG, PIXELS)
        assert logit_scale == pytest.approx(float(np.exp(params["logit_scale"])))
        graph = parse_onnx(path).graph
        assert tuple(value.name for value in graph.input) == ends
        assert [value.name for value in graph.output] == ["image_embeds" if name == "vision" else "text_embeds"]
        levels = {node.accuracy_level for node in read_quantized(path).values()} - {None}
        assert levels == {form.accuracy_level}
    again = tmp_path / "again"
    again.mkdir()
    write(again, params, form)
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_file_that_differs_is_detected(params: Params, tmp_path: pathlib.Path) -> None:
    write(tmp_path, params)
    leaf = flatten_dict(params, sep="/")[FC1]
    for change in ({"trits": -leaf.trits}, {"scale": leaf.scale * np.float32(1.0000001)}):
        with pytest.raises(ValueError, match=r"vision_model_q2.onnx: image/blocks/0/mlp/fc1/kernel differs"):
            verify_onnx(tmp_path, CONFIG, changed(params, FC1, **change), Form())
    level = r"kernel has accuracy_level 4, not 1"
    with pytest.raises(ValueError, match=level):
        verify_onnx(tmp_path, CONFIG, params, Form(accuracy_level=1))


@pytest.mark.parametrize(("name", "value"), [("num_heads", 4), ("unidirectional", 1)])
def test_another_attention_is_detected(name: str, value: int, params: Params, tmp_path: pathlib.Path) -> None:
    write(tmp_path, params)
    path = tmp_path / "vision_model_q2.onnx"
    model = parse_onnx(path)
    set_attribute(next(node for node in model.graph.node if node.op_type == "MultiHeadAttention"), name, value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=f"^{path}: its attentions and activations are not 2 times"):
        verify_onnx(tmp_path, CONFIG, params, PACKED)


@pytest.mark.parametrize(
    ("change", "form", "message"),
    [
        (
            lambda p: changed(p, FC1, scale=np.ones((2, 4, 256), np.float32), group=16),
            Form(),
            f"{FC1} has groups of 16 along 64 inputs: ONNX Runtime has 2-bit products for blocks of 32, 64 and 128",
        ),
        (
            lambda p: changed(p, FC1, scale=np.full((2, 1, 256), 0.1, np.float32)),
            Form(dtype="float16"),
            f"{FC1}: scale 0.100000001 is not exact in float16: export with --dtype float32",
        ),
        (
            lambda p: changed(p, FC1, scale=np.full((2, 1, 256), np.nan, np.float32)),
            Form(),
            f"{FC1}: scale nan is not exact in float32",
        ),
        (
            lambda p: changed(p, FC1, trits=np.full((2, 64, 256), 2, np.int8)),
            Form(),
            f"{FC1}: trits are −1, 0 and \\+1: found 2 to 2",
        ),
        (lambda p: p | {"more": np.zeros(1)}, Form(), "the parameter tree does not fit the model: unexpected more"),
        (lambda p: p | {"logit_scale": np.zeros(2)}, Form(), r"logit_scale has shape \(2,\): the model's is \(\)"),
        (
            lambda p: unflatten_dict(
                {
                    **flatten_dict(p, sep="/"),
                    "image/position_embedding": np.full((5, 64), 1e6, np.float32),
                },
                sep="/",
            ),
            Form(dtype="float16"),
            "image/position_embedding is not finite in float16",
        ),
        (
            lambda p: unflatten_dict(
                {
                    path: leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf
                    for path, leaf in flatten_dict(p, sep="/").items()
                },
                sep="/",
            ),
            Form(),
            "no parameter is quantized: onnx packs trits and integers; onnx-fp32 and onnx-fp16 write float weights",
        ),
    ],
)
def test_what_onnx_cannot_hold_is_not_written(
    change: Callable[[Params], Params], form: Form, message: str, params: Params, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, change(params), form)
    assert not list(tmp_path.iterdir())


def test_a_tower_of_more_than_2_gib_is_refused(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interop_onnx, "_MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"the image tower has [\d,]+ bytes: an ONNX file holds 10,000"):
        write(tmp_path, params)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model, node: node.attribute.remove(attribute(node, "bits")), "bits 0, not one of 2, 4, 8"),
        (lambda model, node: set_attribute(node, "block_size", 256), "block_size 256, not one of 128, 64, 32"),
        (lambda model, node: set_attribute(node, "K", 2**40), "do not hold 1099511627776 inputs in blocks of"),
        (lambda model, node: set_attribute(node, "N", 7), "N 7, not"),
        (lambda model, node: node.input.append(node.input[2]), "no zero points or bias"),
        (lambda model, node: codes(model, node).dims.__setitem__(0, 2**40), "damaged one"),
        (lambda model, node: codes(model, node).dims.append(1), "expected 3 axes"),
        (lambda model, node: setattr(codes(model, node), "raw_data", codes(model, node).raw_data[:-1]), "damaged one"),
        (lambda model, node: zero(codes(model, node)), "a 2-bit code is 0, which is no trit"),
        (lambda model, node: move_outside(codes(model, node)), "is in another file"),
        (lambda model, node: model.graph.node.append(node), "damaged one"),
    ],
)
def test_a_damaged_file_is_one_line(
    damage: Callable[[Any, Any], Any], message: str, params: Params, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, params)
    path = tmp_path / "vision_model_q2.onnx"
    model = parse_onnx(path)
    damage(model, next(node for node in model.graph.node if node.op_type == "MatMulNBits"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        read_quantized(path)


def attribute(node: Any, name: str) -> Any:
    return next(each for each in node.attribute if each.name == name)


def set_attribute(node: Any, name: str, value: int) -> None:
    attribute(node, name).i = value


def codes(model: Any, node: Any) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])


def move_outside(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="other.bin")


def zero(tensor: Any) -> None:
    tensor.raw_data = bytes(len(tensor.raw_data))


def test_a_truncated_or_foreign_file_is_one_line(params: Params, tmp_path: pathlib.Path) -> None:
    write(tmp_path, params)
    path = tmp_path / "vision_model_q2.onnx"
    whole = path.read_bytes()
    for content in (b"", b"not ONNX", whole[:1000], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path} is not an ONNX file, or a damaged one: "):
            read_metadata(path)
    model = onnx.ModelProto.FromString(whole)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="does not state a model of tclip_jax"):
        read_metadata(path)


def test_a_runtime_without_2_bits_is_refused_by_its_version(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.27.1")
    with pytest.raises(ValueError, match=r"onnxruntime 1\.27\.1 has no product with 2-bit weights .* install 1\.28\.0"):
        export_model(tmp_path / "out", config=CONFIG, preprocess=PIXELS, params=params, formats=["onnx"])
    assert not list(tmp_path.iterdir())


def test_without_a_runtime_the_export_says_that_nothing_was_run(
    params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write(tmp_path, params)
    unused: Any = None
    line = verify_embeddings(tmp_path, Form(), unused)
    assert line.endswith("not run, because onnxruntime is not installed; trits and scales were read back")


def test_the_command(params: Params, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    write_artifact(artifact, config=CONFIG, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), "--to", "onnx,onnx-fp32", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}/onnx/vision_model_q2.onnx  0.1 MB  onnxruntime 1.28 or newer" in shown
    assert "vision_model.onnx and text_model.onnx: embeddings differ by at most " in shown
    assert {path.name for path in (out / "onnx").iterdir()} == {
        *("vision_model_q2.onnx", "text_model_q2.onnx", "vision_model.onnx", "text_model.onnx")
    }
    card = (out / "README.md").read_text()
    assert "tags: [clip, ternary, onnx]" in card and "vision_model_q2.onnx" in card
    # transformers pools at a token that the vocabulary of 60 lacks, so transformers.js is not offered.
    assert not (out / "config.json").exists() and "transformers.js" not in card
    (out / "onnx" / "vision_model_q2.onnx").write_bytes(b"cut")
    assert main(["compare", "activations", str(artifact), str(out / "onnx")]) == 2
    assert "is not an ONNX file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "gguf-tq1_0", "--accuracy-level", "1"], "--accuracy-level is for onnx, and --to is gguf-tq1_0"),
        (["--to", "onnx", "--dtype", "bfloat16"], "onnx has no dtype bfloat16: choose float32 or float16"),
        (
            ["--to", "onnx-fp16", "--dtype", "float16"],
            "--dtype is for open_clip, hf, big_vision, onnx, and --to is onnx-fp16",
        ),
    ],
)
def test_options_that_a_format_does_not_take(
    options: list[str], message: str, params: Params, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tmp_path / "artifact"
    write_artifact(artifact, config=CONFIG, preprocess=PIXELS, params=params, rules=(), rest_dtype="float32")
    assert main(["export", str(artifact), *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.runtimes
def test_config_json_names_the_files_for_transformers_js(random_params: Draw, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, vocab_size=49408))
    packed = pack_params(random_params(config), ternary_rules("Q-FFN", Quantizer()))
    same: dict[str, Any] = {"config": config, "preprocess": PIXELS, "params": packed}
    export_model(tmp_path / "out", **same, formats=["onnx"], dtype="float16")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["model_type"] == "clip" and document["transformers.js_config"] == {"dtype": "q2f16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert '{ dtype: "q2f16" }' in card and "vision_model_q2f16.onnx" in card
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
