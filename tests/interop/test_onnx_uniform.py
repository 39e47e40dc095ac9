"""ONNX files with weights of 4 and 8 bits: integers and scales to the bit, and their products in ONNX Runtime."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tclip_jax.artifacts import pack_params
from tclip_jax.artifacts.pack import compiled_quantize
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import make_examples
from tclip_jax.interop.export import export_model
from tclip_jax.interop.onnx import fewest_bits, read_quantized, verify_embeddings, verify_onnx, write_onnx
from tclip_jax.interop.onnx_blocks import BLOCKS, Blocks, decode_blocks, encode_blocks
from tclip_jax.interop.onnx_graph import Form
from tclip_jax.interop.onnx_session import run_onnx
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ATTENTION, MLP, PATCH_EMBEDDING, TOKEN_EMBEDDING, TernaryRules
from tclip_jax.ternary import Quantizer
from tclip_jax.ternary.uniform import pack_uniform

onnx = pytest.importorskip("onnx", reason="the onnx package is not installed (pip install -e '.[onnx]')")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install -e '.[onnx]')")

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]
Bits = Literal[4, 8]

CONFIG = CLIPConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=64, layers=2, head_width=32),
    text=TextConfig(context_length=8, vocab_size=60, width=32, heads=2, layers=1),
)
FC1, TABLE = "image/blocks/mlp/fc1/kernel", TOKEN_EMBEDDING
every_width = pytest.mark.parametrize("bits", [4, 8])


def uniform(bits: Bits, group: Any = 32) -> Quantizer:
    return Quantizer(kind="uniform", bits=bits, group=group)


def rules(name: str) -> TernaryRules:
    whole = f"{MLP}|{ATTENTION}|{TOKEN_EMBEDDING}|{PATCH_EMBEDDING}"
    return {
        "4": ((whole, uniform(4)),),
        "8": ((whole, uniform(8, "channel")),),
        "mixed": (
            (TOKEN_EMBEDDING, uniform(4, "channel")),
            (ATTENTION, uniform(8)),
            (PATCH_EMBEDDING, uniform(8, 64)),
            (MLP, Quantizer()),
        ),
    }[name]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    length=st.integers(1, 300),
    group=st.sampled_from([16, 32, 96, 256, 1000]),
    axis=st.sampled_from([-2, -1]),
    seed=st.integers(0, 99),
)
def test_blocks_hold_every_integer_and_scale(bits: Bits, length: int, group: int, axis: int, seed: int) -> None:
    rng, group, largest = np.random.default_rng(seed), min(group, length), 2 ** (bits - 1) - 1
    shapes = [(3, length), (3, -(-length // group))]
    integers = rng.integers(-largest, largest + 1, shapes[0]).astype(np.int8)
    scale = rng.integers(1, 256, shapes[1]).astype(np.float32) / 1024
    turned = [integers.T, scale.T] if axis == -2 else [integers, scale]
    weight, path = pack_uniform(*turned, bits, group, axis), FC1 if axis == -2 else TABLE
    if scale.shape[1] > 1 and group % 32:
        with pytest.raises(ValueError, match=f"ONNX Runtime has {bits}-bit products for blocks of 32, 64 and 128"):
            encode_blocks(path, weight, "float32")
        return
    blocks = encode_blocks(path, weight, "float16")
    assert blocks.block in BLOCKS and blocks.bits == bits
    assert blocks.codes.nbytes == 3 * blocks.scale.shape[1] * blocks.block * bits // 8
    found, scales = decode_blocks(blocks)
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_array_equal(scales, scale.repeat(group, 1)[:, :length])


def test_the_codes_are_those_of_the_operators() -> None:
    """(code − 2^(bits − 1)) · scale, the first of two codes in the low bits."""
    w = np.array([[7.0], [-7.0], [1.0], [0.0]], np.float32)
    assert encode_blocks(FC1, compiled_quantize(w, uniform(4)), "float32").codes[0, :3].tolist() == [0x1F, 0x89, 0x88]
    w = np.array([[127.0], [-127.0], [1.0], [0.0]], np.float32)
    assert encode_blocks(FC1, compiled_quantize(w, uniform(8)), "float32").codes[0, :4].tolist() == [255, 1, 129, 128]


@every_width
def test_a_code_below_the_symmetric_range_is_refused(bits: Bits) -> None:
    blocks = Blocks(np.zeros((1, 32 * bits // 8), np.uint8), np.ones((1, 1), np.float32), 32, 32, bits)
    with pytest.raises(ValueError, match=f"a {bits}-bit code is 0, which is below −{2 ** (bits - 1) - 1}"):
        decode_blocks(blocks)


@pytest.mark.parametrize("which", ["4", "8", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_runtime_computes_what_jax_does(
    which: str, dtype: str, random_params: Draw, tmp_path: pathlib.Path
) -> None:
    params = pack_params(random_params(CONFIG), rules(which))
    bits = fewest_bits(params)
    assert bits == {"4": 4, "8": 8, "mixed": 2}[which]
    for form in (Form(True, dtype, 1, bits), Form(True, dtype, 4, bits), Form(False, dtype)):
        write_onnx(tmp_path, config=CONFIG, preprocess=Preprocess(16), params=params, form=form)
        verify_onnx(tmp_path, CONFIG, params, form)
        line = verify_embeddings(tmp_path, form, make_examples(CONFIG, params, dtype=dtype, floats=not form.packed))
        assert "embeddings differ by at most" in line and "(onnxruntime " in line
    suffix = {("4", "float32"): "_q4", ("4", "float16"): "_q4f16", ("mixed", "float32"): "_q2"}
    names = [f"vision_model{suffix.get((which, dtype), '_quantized' if which == '8' else '_q2f16')}.onnx"]
    nodes = read_quantized(tmp_path / names[0])
    assert nodes["image/blocks/1/attention/qkv/kernel"].bits == (4 if which == "4" else 8)
    assert nodes["image/blocks/1/mlp/fc1/kernel"].bits == {"4": 4, "8": 8, "mixed": 2}[which]


@every_width
def test_one_product_in_the_runtime_equals_numpy(bits: Bits) -> None:
    """The operator alone, with a short last block, against float64."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((100, 5)).astype(np.float32), rng.standard_normal((3, 100)).astype(np.float32)
    weight = compiled_quantize(w, uniform(bits))
    blocks = encode_blocks(FC1, weight, "float32")
    helper, types = onnx.helper, onnx.TensorProto
    codes = blocks.codes.reshape(*blocks.scale.shape, -1)
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in (("b", codes), ("s", blocks.scale))]
    options = {"K": 100, "N": 5, "bits": bits, "block_size": blocks.block, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["pixel_values", "b", "s"], ["y"], domain="com.microsoft", **options)
    x_info = helper.make_tensor_value_info("pixel_values", types.FLOAT, [3, 1, 1, 100])
    y_info = helper.make_tensor_value_info("y", types.FLOAT, [3, 1, 1, 5])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x_info], [y_info], constants), opset_imports=opsets, ir_version=9
    )
    (y,) = run_onnx(model.SerializeToString(), "image", x.reshape(3, 1, 100, 1), ["y"])
    scale = np.float64(weight.scale).repeat(32, 0)[:100]
    expected = np.float64(x) @ (np.float64(weight.integers) * scale)
    np.testing.assert_allclose(y.reshape(3, 5), expected, atol=1e-5)


def test_another_width_than_the_form_is_refused(random_params: Draw, tmp_path: pathlib.Path) -> None:
    params = pack_params(random_params(CONFIG), rules("8"))
    with pytest.raises(ValueError, match=r"the fewest bits of a weight are 8: form\.bits is 2"):
        write_onnx(tmp_path, config=CONFIG, preprocess=Preprocess(16), params=params, form=Form())
    assert not list(tmp_path.iterdir())


def test_an_export_describes_itself_and_other_formats_refuse(random_params: Draw, tmp_path: pathlib.Path) -> None:
    params = pack_params(random_params(CONFIG), rules("4"))
    same: dict[str, Any] = {"config": CONFIG, "preprocess": Preprocess(16), "params": params}
    exported = export_model(tmp_path / "out", **same, formats=["onnx", "open_clip"])
    assert {name for name, *_ in exported.files} == {
        *("onnx/vision_model_q4.onnx", "onnx/text_model_q4.onnx", "open_clip_model.safetensors")
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "have 4 or 8 bits (integers times a scale)" in card and "vision_model_q4.onnx" in card
    assert "scale · integer" in card and "ternary" not in card.partition("---\n\n")[0]
    for name, what in (("gguf-tq1_0", "GGUF"), ("torch", "packed PyTorch")):
        with pytest.raises(
            ValueError, match=rf"^image/\S+ has integers of 4 bits: {what} holds ternary and float weights;"
        ):
            export_model(tmp_path / name, **same, formats=[name])
        assert not (tmp_path / name).exists()
