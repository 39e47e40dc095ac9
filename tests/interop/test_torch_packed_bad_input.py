"""Folders and models that do not fit: one line that names what is wrong, and a model that is as it was."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tclip_jax.artifacts import pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.torch_packed import write_torch
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[test]')")

import tclip_torch  # noqa: E402  it imports torch

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:tclip_torch has no native kernel")]

CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=32, layers=1, head_width=16),
    text=TextConfig(context_length=8, width=32, heads=2, layers=1),
)
FC1 = "visual.transformer.resblocks.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def written(random_params: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("export") / "torch"
    params = pack_params(random_params(CONFIG), ternary_rules("Q-ALL", Quantizer(group=32)))
    write_torch(epath.Path(folder), config=CONFIG, preprocess=Preprocess(16), params=params)
    return folder


@pytest.fixture
def folder(written: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(written, tmp_path / "torch")


def edit_config(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def refused(folder: pathlib.Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        tclip_torch.load(folder)
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (
        lambda c: c.update(version=2),
        r"config\.json is not that of an export of this version: it must",
    ),
    "no model": (lambda c: c.pop("model_cfg"), "config.json is not that of an export of this version: 'model_cfg'"),
    "a model of words": (lambda c: c["model_cfg"].update(vision_cfg="large"), "model_cfg is not that of a CLIP model"),
    "no width": (lambda c: c["model_cfg"]["text_cfg"].pop("width"), "model_cfg is not that of a CLIP model"),
    "a million layers": (
        lambda c: c["model_cfg"]["text_cfg"].update(layers=10**6),
        r"lacks transformer\.resblocks\.1\.ln_1\.weight",
    ),
    "heads": (lambda c: c["model_cfg"]["text_cfg"].update(heads=5), "width 32 is not divisible by 5 heads"),
    "a wide tower": (
        lambda c: c["model_cfg"]["vision_cfg"].update(width=10**9),
        r"conv1\.weight has shape \(32, 3, 8, 8\): the model's is \(1000000000, 3, 8, 8\)",
    ),
    "a huge weight": (
        lambda c: c["packed"][FC1].update(shape=[2**30, 32]),
        rf"{FC1} has shape \(1073741824, 32\): the model's is \(128, 32\)",
    ),
    "a shape of words": (lambda c: c["packed"][FC1].update(shape=["a", 32]), "needs a shape of two positive integers"),
    "no group": (lambda c: c["packed"][FC1].update(group=0), "needs a shape of two positive integers, and a group"),
    "another group": (lambda c: c["packed"][FC1].update(group=16), r"scales \(4, 1, 32\): its shape .* need"),
    "a packed name that is not there": (
        lambda c: c["packed"].update(x={"shape": [1, 1], "group": 1}),
        r"model\.safetensors lacks x\.scales, which config\.json lists as packed",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_lies(case: str, folder: pathlib.Path) -> None:
    change, match = CONFIGS[case]
    edit_config(folder, change)
    refused(folder, match)


TENSORS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a missing tensor": (lambda t: t.pop("ln_final.bias"), r"lacks ln_final\.bias"),
    "what is not a trit": (lambda t: t[f"{FC1}.words"].fill(-1), "c_fc.weight is damaged: a field is not a trit"),
    "a row that is not of trits": (
        lambda t: t["token_embedding.weight.words"].fill(0b10),
        r"token_embedding\.weight is damaged: a field is not a trit",
    ),
    "a scale of NaN": (
        lambda t: t.update({f"{FC1}.scales": np.full((4, 1, 32), np.nan, np.float32)}),
        "c_fc.weight is damaged: a field is not a trit, or a scale is not finite",
    ),
    "words of floats": (
        lambda t: t.update({f"{FC1}.words": t[f"{FC1}.words"].astype(np.float32)}),
        r"c_fc\.weight\.words is torch\.float32: it must be torch\.int32",
    ),
    "fewer words": (
        lambda t: t.update({f"{FC1}.words": np.ascontiguousarray(t[f"{FC1}.words"][:-1])}),
        r"c_fc\.weight has words \(3, 2, 32\)",
    ),
    "fewer rows": (
        lambda t: t.update({"token_embedding.weight.words": np.zeros((3, 8), np.uint8)}),
        r"token_embedding\.weight\.words \(3, 8\) do not hold 49408 rows of 32 trits",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, folder: pathlib.Path) -> None:
    change, match = TENSORS[case]
    edit_tensors(folder, change)
    refused(folder, match)


def test_files_that_are_no_export(folder: pathlib.Path) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    good = weights.read_bytes()
    for data in (b"", good[:1000], good[:-100], struct.pack("<Q", 2**62) + good[8:], b"PK" * 500):
        weights.write_bytes(data)
        refused(folder, r"model\.safetensors is not a safetensors file: ")
    weights.write_bytes(good)
    for text in ("", "[]", "null", "[" * 100_000, '{"format": "tclip_torch", "version": 1, "packed": []}'):
        config.write_text(text)
        refused(folder, r"config\.json is not that of an export of this version")
    config.write_bytes(b" " * (9 * 2**20))
    refused(folder, r"config\.json has 9437184 bytes: it is not what `tclip export --to torch` writes")
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        tclip_torch.load(folder)
    with pytest.raises(ValueError, match="activations 'A4' is not one of A32, A16, A8"):
        tclip_torch.load(folder, "A4")


def open_clip_model(**options: Any) -> Any:
    import open_clip

    towers = {name: dataclasses.replace(getattr(CONFIG, name), **options.pop(name, {})) for name in ("vision", "text")}
    return open_clip.CLIP(**dataclasses.replace(CONFIG, **options, **towers).to_open_clip())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quick_gelu": True}, "the model has quick_gelu True: the exported one has False"),
        ({"text": {"heads": 4}}, r"the model has heads \(2, 4\): the exported one has \(2, 2\)"),
        ({"vision": {"pool_type": "avg"}}, "the model has vision pool_type avg: the exported one has tok"),
        ({"text": {"pool_type": "last"}}, "the model has text pool_type last: the exported one has argmax"),
        ({"text": {"no_causal_mask": True}}, "the model has no_causal_mask True: the exported one has False"),
        ({"vision": {"layers": 2}}, r"has, in excess, visual\.transformer\.resblocks\.1\.attn\.in_proj_bias"),
        ({"vision": {"no_ln_pre": True}}, r"the model lacks visual\.ln_pre\.bias"),
        (
            {"text": {"context_length": 9}},
            r"positional_embedding of the model has shape \(9, 32\): the exported .*8, 32",
        ),
        ({"embed_dim": 20}, r"proj\S* of the model has shape \(32, 20\): the exported one has \(32, 16\)"),
    ],
)
def test_an_open_clip_model_of_another_shape_stays_as_it_was(
    options: dict[str, Any], match: str, written: pathlib.Path
) -> None:
    model = open_clip_model(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        tclip_torch.replace_linears(model, written)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_damage_in_the_last_layer_leaves_the_model_as_it_was(folder: pathlib.Path) -> None:
    edit_tensors(folder, lambda t: t["transformer.resblocks.0.mlp.c_proj.weight.words"].fill(-1))
    model = open_clip_model()
    with pytest.raises(ValueError, match=r"transformer\.resblocks\.0\.mlp\.c_proj\.weight is damaged"):
        tclip_torch.replace_linears(model, folder)
    assert isinstance(model.visual.transformer.resblocks[0].attn, torch.nn.MultiheadAttention)


def test_other_models_dtypes_and_devices_are_refused(written: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="Linear is not open_clip's CLIP or transformers' CLIPModel"):
        tclip_torch.replace_linears(torch.nn.Linear(2, 2), written)
    with pytest.raises(TypeError, match=r"is torch\.float16: packed layers need torch\.float32 or torch\.bfloat16"):
        tclip_torch.replace_linears(open_clip_model().half(), written)
    with pytest.raises(TypeError, match="is on the meta device, without values"):
        tclip_torch.replace_linears(open_clip_model().to("meta"), written)


@pytest.mark.parametrize(
    ("tower", "option", "value", "match"),
    [
        ("vision_config", "hidden_act", "quick_gelu", r"hidden_act \('quick_gelu', 'gelu'\)"),
        ("text_config", "num_attention_heads", 4, r"num_attention_heads \(2, 4\)"),
        ("text_config", "layer_norm_eps", 1e-6, r"layer_norm_eps \(1e-05, 1e-06\)"),
        ("text_config", "eos_token_id", 7, r"eos_token_id 7: the exported one has 49407"),
    ],
)
def test_a_transformers_model_with_other_options_is_refused(
    tower: str, option: str, value: Any, match: str, written: pathlib.Path
) -> None:
    import transformers

    described = hugging_face_config(CONFIG, "float32")
    described[tower][option] = value
    model = transformers.CLIPModel(transformers.CLIPConfig(**described))
    with pytest.raises(ValueError, match=f"the model has {match}"):
        tclip_torch.replace_linears(model, written)


def test_names_of_transformers_that_lie_are_refused(folder: pathlib.Path) -> None:
    import transformers

    model = transformers.CLIPModel(transformers.CLIPConfig(**hugging_face_config(CONFIG, "float32")))
    for names, match in (({"x": 1}, "does not name the tensors"), ({"x": ["y", None, False]}, "the model lacks x")):
        edit_config(folder, lambda config, names=names: config.update(transformers=names))
        with pytest.raises(ValueError, match=match):
            tclip_torch.replace_linears(model, folder)


def test_inputs_of_another_shape_are_refused(written: pathlib.Path) -> None:
    model = tclip_torch.load(written)
    with pytest.raises(ValueError, match=r"pixels are \(1, 16, 16, 3\): the model takes \(N, 3, 16, 16\)$"):
        model.encode_image(torch.zeros(1, 16, 16, 3))
    with pytest.raises(ValueError, match=r"tokens are \(1, 9\): the model takes \(N, T\), T ≤ 8$"):
        model.encode_text(torch.zeros(1, 9, dtype=int))
    with pytest.raises(IndexError, match="out of range"):
        model.encode_text(torch.full((1, 3), 49408))
