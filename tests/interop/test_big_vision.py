"""big_vision's checkpoints: read as open_clip reads them, written back to the same bytes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.big_vision import from_big_vision, open_big_vision, to_big_vision
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.interop.export import export_model
from tclip_jax.interop.importing import import_checkpoint
from tclip_jax.interop.open_clip import from_open_clip
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor
from tests import siglip

SIGLIP = CLIPConfig(
    embed_dim=32,
    vision=VisionConfig(
        image_size=(24, 24),
        patch_size=8,
        width=32,
        layers=2,
        head_width=8,
        mlp_ratio=1.5,
        approximate="tanh",
        **siglip.VISION,
    ),
    text=TextConfig(
        context_length=7,
        vocab_size=99,
        width=16,
        heads=2,
        layers=3,
        approximate="tanh",
        hf_tokenizer_name="big_vision",
        **siglip.TEXT,
    ),
    init_logit_bias=-10.0,
)
TOKEN = dataclasses.replace(
    SIGLIP,
    embed_dim=20,
    vision=dataclasses.replace(SIGLIP.vision, class_token=True, pool_type="tok", projection=True),
    init_logit_bias=None,
)
MEAN = dataclasses.replace(
    SIGLIP,
    vision=dataclasses.replace(SIGLIP.vision, pool_type="avg"),
    text=dataclasses.replace(SIGLIP.text, width=32, proj_bias=False, proj_type="none"),
)
MODELS = {"siglip": SIGLIP, "token": TOKEN, "mean": MEAN}


def arrays_of_siglip() -> dict[str, np.ndarray]:
    """The arrays of a SigLIP in big_vision with random values, by the names and shapes of its modules."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, *shape: int) -> None:
        arrays[f"params/{name}"] = rng.standard_normal(shape, np.float32)

    def dense(name: str, rows: int, columns: int) -> None:
        put(f"{name}/kernel", rows, columns)
        put(f"{name}/bias", columns)

    def norm(name: str, width: int) -> None:
        put(f"{name}/scale", width)
        put(f"{name}/bias", width)

    def attention(name: str, width: int, heads: int) -> None:
        for part in ("query", "key", "value"):
            put(f"{name}/MultiHeadDotProductAttention_0/{part}/kernel", width, heads, width // heads)
            put(f"{name}/MultiHeadDotProductAttention_0/{part}/bias", heads, width // heads)
        put(f"{name}/MultiHeadDotProductAttention_0/out/kernel", heads, width // heads, width)
        put(f"{name}/MultiHeadDotProductAttention_0/out/bias", width)

    put("img/embedding/kernel", 8, 8, 3, 32)
    put("img/embedding/bias", 32)
    put("img/pos_embedding", 1, 9, 32)
    put("txt/Embed_0/embedding", 99, 16)
    put("txt/pos_embedding", 1, 7, 16)
    for tower, width, heads, hidden, layers in (("img/Transformer", 32, 4, 48, 2), ("txt/Encoder_0", 16, 2, 64, 3)):
        for i in range(layers):
            block = f"{tower}/encoderblock_{i}"
            attention(block, width, heads)
            norm(f"{block}/LayerNorm_0", width)
            norm(f"{block}/LayerNorm_1", width)
            dense(f"{block}/MlpBlock_0/Dense_0", width, hidden)
            dense(f"{block}/MlpBlock_0/Dense_1", hidden, width)
        norm(f"{tower}/encoder_norm", width)
    put("img/MAPHead_0/probe", 1, 1, 32)
    attention("img/MAPHead_0", 32, 4)
    norm("img/MAPHead_0/LayerNorm_0", 32)
    dense("img/MAPHead_0/MlpBlock_0/Dense_0", 32, 48)
    dense("img/MAPHead_0/MlpBlock_0/Dense_1", 48, 32)
    dense("txt/head", 16, 32)
    put("t", 1)
    put("b", 1)
    return arrays


def scanned(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same checkpoint with the blocks stacked, as with big_vision's `scan`."""
    stacked = {name: value for name, value in arrays.items() if "/encoderblock_" not in name}
    for name in arrays:
        tower, found, rest = name.partition("/encoderblock_0/")
        if found:
            layers = [arrays[each] for i in range(9) if (each := f"{tower}/encoderblock_{i}/{rest}") in arrays]
            stacked[f"{tower}/encoderblock/{rest}"] = np.stack(layers)
    return stacked


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return arrays_of_siglip()


@pytest.fixture
def checkpoint(arrays: dict[str, np.ndarray], tmp_path: pathlib.Path) -> pathlib.Path:
    np.savez(tmp_path / "siglip.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "siglip.npz"


def leaves_of(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def assert_equal_trees(one: Any, two: Any) -> None:
    ours, theirs = leaves_of(one), leaves_of(two)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], path)


@pytest.mark.torch
@pytest.mark.parametrize("layout", [dict, scanned])
def test_a_checkpoint_is_read_as_open_clip_reads_it(
    layout: Callable[..., dict[str, np.ndarray]], arrays: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from open_clip.convert import load_big_vision_weights
    from open_clip.transformer import TextTransformer
    from timm.models.vision_transformer import VisionTransformer

    path = tmp_path / "siglip.npz"
    np.savez(path, **layout(arrays))
    assert timm
    trunk = VisionTransformer(
        img_size=24,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=1.5,
        num_classes=0,
        class_token=False,
        global_pool="map",
        act_layer="gelu_tanh",
    )
    text = TextTransformer(
        context_length=7,
        vocab_size=99,
        width=16,
        heads=2,
        layers=3,
        output_dim=32,
        no_causal_mask=True,
        pool_type="last",
        proj_bias=True,
        act_layer=lambda: torch.nn.GELU(approximate="tanh"),
        norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
    )
    scalars = {"logit_scale": torch.zeros(()), "logit_bias": torch.zeros(())}
    model: Any = types.SimpleNamespace(visual=types.SimpleNamespace(trunk=trunk), text=text, **scalars)
    load_big_vision_weights(model, str(path))
    state = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    state |= {f"text.{key}": value for key, value in text.state_dict().items() if key != "attn_mask"} | scalars
    opened = open_checkpoint(path)
    assert opened.config == SIGLIP
    params = jax.tree.map(np.asarray, opened.params)
    assert_equal_trees(params, from_open_clip({key: value.numpy() for key, value in state.items()}, SIGLIP))
    rng = np.random.default_rng(1)
    pixels, tokens = rng.standard_normal((2, 24, 24, 3), np.float32), rng.integers(0, 99, (2, 7), np.int32)
    with jax.default_matmul_precision("highest"):
        image, words, _ = CLIP(opened.config).apply({"params": params}, pixels, tokens)  # type: ignore[misc]
    with torch.no_grad():
        theirs = trunk.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2)), text.eval()(torch.from_numpy(tokens))
    for ours, other in zip((image, words), theirs, strict=True):
        other = torch.nn.functional.normalize(other, dim=-1)
        np.testing.assert_allclose(ours, other, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_params_go_to_big_vision_and_back(
    name: str, random_params: Callable[[CLIPConfig], dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    config = MODELS[name]
    params = random_params(config)
    if config.vision.class_token:
        params["image"]["position_embedding"][0] = 0
    arrays = {key: np.asarray(value) for key, value in to_big_vision(params, config).items()}
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    opened = open_checkpoint(tmp_path / "x.npz")
    assert opened.config == config and opened.preprocess.mean == (0.5,) * 3
    assert_equal_trees(opened.params, params)
    again = to_big_vision(opened.params, config)
    assert {key: np.asarray(value).tobytes() for key, value in again.items()} == {
        key: value.tobytes() for key, value in arrays.items()
    }


def test_the_position_of_a_class_token_is_added_to_it(random_params: Callable[[CLIPConfig], dict[str, Any]]) -> None:
    params = random_params(TOKEN)
    arrays = {key.removeprefix("params/"): value for key, value in to_big_vision(params, TOKEN).items()}
    del arrays["img/head/bias"]
    back = from_big_vision(arrays, TOKEN)
    rng = np.random.default_rng(1)
    pixels, tokens = rng.standard_normal((2, 24, 24, 3), np.float32), rng.integers(0, 99, (2, 7), np.int32)
    apply = jax.jit(lambda params: CLIP(TOKEN).apply({"params": params}, pixels, tokens)[0])
    np.testing.assert_array_equal(apply(params), apply(jax.tree.map(np.asarray, back)))


def test_what_was_assumed_is_logged(checkpoint: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_checkpoint(checkpoint)
    (record,) = caplog.records
    for part in ("siglip.npz states no configuration", "24x24", "GELU by tanh", "bicubic squash", "--model-cfg"):
        assert part in record.getMessage()


def test_a_given_model_is_taken_as_it_is(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    erf = dataclasses.replace(SIGLIP, text=dataclasses.replace(SIGLIP.text, approximate="none", norm_eps=1e-5))
    (tmp_path / "model.json").write_text(json.dumps({"model_cfg": erf.to_open_clip(), "preprocess_cfg": {}}))
    with pytest.raises(ValueError, match=r"siglip\.npz: text_cfg\.norm_eps is 1e-05: big_vision's models can only"):
        open_checkpoint(checkpoint, like=str(tmp_path / "model.json"))
    erf = dataclasses.replace(erf, text=dataclasses.replace(erf.text, norm_eps=1e-6))
    (tmp_path / "model.json").write_text(json.dumps(erf.to_open_clip()))
    opened = open_checkpoint(checkpoint, like=str(tmp_path / "model.json"))
    assert opened.config == erf and opened.preprocess.resize_mode == "squash"
    assert "no preprocessing" in caplog.text or "assum" in caplog.text  # the file states none
    caplog.clear()
    stated = {"model_cfg": erf.to_open_clip(), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "model.json").write_text(json.dumps(stated))
    assert open_checkpoint(checkpoint, like=str(tmp_path / "model.json")).preprocess.mean == (0.5, 0.5, 0.5)
    assert not caplog.records


@pytest.mark.torch
@pytest.mark.parametrize("size", [16, 40])
def test_another_image_size_is_that_of_timm(size: int, checkpoint: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    torch, layers = pytest.importorskip("torch"), pytest.importorskip("timm.layers")
    opened = open_checkpoint(checkpoint, image_size=size)
    old = torch.from_numpy(arrays["params/img/pos_embedding"])
    expected = layers.resample_abs_pos_embed(old, [size // 8] * 2, num_prefix_tokens=0)[0]
    np.testing.assert_allclose(opened.params["image"]["position_embedding"], expected, atol=1e-5)
    assert opened.config.vision.image_size == opened.preprocess.size == (size, size)


def test_bfloat16_and_optimizer_states_are_read(arrays: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    half = {name: np.asarray(value, jnp.bfloat16) for name, value in arrays.items()}
    np.savez(tmp_path / "half.npz", **half, **{"opt/0/mu/img/embedding/bias": np.ones(3)})  # type: ignore[arg-type]
    target = {name.replace("params/", "opt/target/"): value.astype(np.float32) for name, value in half.items()}
    np.savez(tmp_path / "old.npz", **target)  # type: ignore[arg-type]
    bare = {name.removeprefix("params/"): value.astype(np.float32) for name, value in half.items()}
    np.savez(tmp_path / "bare.npz", **bare)  # type: ignore[arg-type]
    expected = open_checkpoint(tmp_path / "old.npz").params
    np.testing.assert_array_equal(
        expected["image"]["patch_embedding"]["bias"], half["params/img/embedding/bias"].astype(np.float32)
    )
    for name in ("half.npz", "bare.npz"):
        assert_equal_trees(open_checkpoint(tmp_path / name).params, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params/img/head/kernel": (32, 32), "params/img/head/bias": (32,)}, "it has img/head/bias, and it is not 0"),
        ({"params/txt/MAPHead_0/probe": (1, 1, 16)}, "does not fit the model: unexpected txt/MAPHead_0/probe"),
        ({"params/img/pre_logits/kernel": (32, 32)}, "unexpected img/pre_logits/kernel"),
        ({"params/img/pos_embedding": (1, 8, 32)}, "img/pos_embedding has 8 positions, not a square grid"),
        ({"params/t": None}, "missing t$"),
        ({"params/txt/head/bias": None}, "text_cfg.proj_bias is False: big_vision's models can only have True"),
        ({"params/img/embedding/kernel": None}, "it is not a model of two transformers: 'img/embedding/kernel'"),
        (
            {"params/img/Transformer/encoderblock/x": (10**6, 0)},
            r"encoderblock/x has shape \(1000000, 0\): an axis is em",
        ),
        ({"params/img/embedding/kernel": (8, 8, 3, 0)}, r"embedding/kernel has shape \(8, 8, 3, 0\): an axis is empty"),
        ({"params/img/Transformer/encoderblock/x": (1001,)}, "encoderblock/x has 1001 layers: at most 1000 are read"),
        (
            {"params/img/Transformer/encoderblock/LayerNorm_0/scale": (2, 32)},
            "img/Transformer/encoderblock_0/LayerNorm_0/scale is there twice, in a scanned array and alone",
        ),
        ({"params/txt/head/bias": (31,)}, r"txt/head/bias has shape \(31,\): the model's is \(32,\)"),
    ],
)
def test_another_model_is_refused(
    change: dict[str, Any], message: str, arrays: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    changed = dict(arrays)
    for name, shape in change.items():
        changed.pop(name, None)
        if shape:
            changed[name] = np.ones(shape, np.float32)
    np.savez(tmp_path / "x.npz", **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^[^\n]*x\.npz: [^\n]*{message}"):
        open_checkpoint(tmp_path / "x.npz")


def test_an_npz_of_another_kind_is_refused(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", predictions=np.ones(3), labels=np.ones(3))
    with pytest.raises(ValueError, match=r"x\.npz has no params/img and params/txt, .* it holds labels, predictions"):
        open_checkpoint(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("vision", {"no_ln_pre": False}, "vision_cfg.no_ln_pre is False"),
        ("text", {"no_causal_mask": False}, "text_cfg.no_causal_mask is False"),
        ("text", {"pool_type": "argmax"}, "text_cfg.pool_type is 'argmax'"),
        ("vision", {"norm_eps": 1e-5}, "vision_cfg.norm_eps is 1e-05"),
        ("text", {"proj_bias": False}, "text_cfg.proj_bias is False"),
    ],
)
def test_what_big_vision_cannot_express_is_named(section: str, changes: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(SIGLIP, **{section: dataclasses.replace(getattr(SIGLIP, section), **changes)})
    with pytest.raises(ValueError, match=f"{message}: big_vision's models can only have"):
        to_big_vision({}, config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trits_go_through_an_export(
    dtype: str, random_params: Callable[[CLIPConfig], dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    rules = ternary_rules("Q-ALL", Quantizer(group="channel"))
    params = pack_params(random_params(SIGLIP), rules)
    out = tmp_path / "release"
    same: dict[str, Any] = {"config": SIGLIP, "preprocess": Preprocess(24, (0.5,) * 3, (0.5,) * 3), "params": params}
    exported = export_model(out, formats=["big_vision"], dtype=dtype, **same)
    assert [name for name, *_ in exported.files] == ["big_vision.npz"]
    card = (out / "README.md").read_text()
    assert "exported from tclip_jax as big_vision." in card and 'load_params("FOLDER/big_vision.npz")' in card
    assert np.load(out / "big_vision.npz")["params/img/embedding/kernel"].dtype == {
        "float32": np.float32,
        "bfloat16": np.dtype("V2"),
    }.get(dtype)
    back = import_checkpoint(out / "big_vision.npz", tmp_path / "back", like=str(out / "open_clip_config.json"))
    packed = flatten(params)
    for path, outcome in back.items():
        if isinstance(packed[path], TernaryTensor):
            assert isinstance(outcome, TernaryTensor)
            np.testing.assert_array_equal(outcome.dequantize(), packed[path].dequantize(), path)
            np.testing.assert_array_equal(outcome.trits, packed[path].trits)


def test_an_export_says_that_gelu_differs(
    random_params: Callable[[CLIPConfig], dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(SIGLIP, vision=dataclasses.replace(SIGLIP.vision, approximate="none"))
    exported = export_model(
        tmp_path / "x", config=config, preprocess=Preprocess(24), params=random_params(config), formats=["big_vision"]
    )
    assert any("big_vision approximates GELU by tanh, and the image tower does not" in note for note in exported.notes)


def test_scanned_blocks_are_read_a_layer_at_a_time(arrays: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "x.npz", **scanned(arrays))  # type: ignore[arg-type]
    tensors = open_big_vision(tmp_path / "x.npz")
    name = "txt/Encoder_0/encoderblock_2/MlpBlock_0/Dense_0/kernel"
    np.testing.assert_array_equal(tensors[name], arrays[f"params/{name}"])
    assert tensors.keys() == {name.removeprefix("params/") for name in arrays}
