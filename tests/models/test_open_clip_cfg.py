"""Every field and model of the installed open_clip is supported, or refused with the field's meaning."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import json
import math
import pathlib
from typing import Any

import pytest

from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.models.presets import PRESETS

TINY = PRESETS["tiny"]
_SPEC = importlib.util.find_spec("open_clip")
_FILES = sorted(pathlib.Path(_SPEC.origin).parent.glob("model_configs/*.json")) if _SPEC and _SPEC.origin else []
SHIPPED = {path.stem: path for path in _FILES}

# Fields of CLIPConfig, which checks them itself.
OURS = {
    "vision_cfg": {field.name for field in dataclasses.fields(VisionConfig)},
    "text_cfg": {field.name for field in dataclasses.fields(TextConfig)},
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias"},
}
# Fields that open_clip does not use in these models, or whose effect its weights overwrite.
UNUSED = {
    "vision_cfg": {"attn_pooler_queries", "attn_pooler_heads"}
    | {"timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"},
    "text_cfg": {"tokenizer_mode", "pad_id", "eos_id", "final_ln_after_pool"}
    | {"hf_model_pretrained", "hf_proj_type", "hf_pooler_type"},
    "": {"nonscalar_logit_scale", "output_dict", "custom_text"},
}


def with_field(section: str, key: str, value: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(TINY)
    (cfg[section] if section else cfg)[key] = value
    return cfg


def fields_of_open_clip() -> list[tuple[str, str, Any]]:
    """(section, field, default) of open_clip's tower configurations, its three models and its factory."""
    import open_clip
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    fields = [
        (section, field.name, field.default)
        for section, cls in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg))
        for field in dataclasses.fields(cls)
    ]
    for model in (open_clip.CLIP, CustomTextCLIP, CoCa):
        parameters = list(inspect.signature(model).parameters.values())
        fields += [
            ("", each.name, each.default) for each in parameters if each.name not in ("pad_id", "multimodal_cfg")
        ]
    return [*fields, ("", "custom_text", False)]


@pytest.mark.torch
def test_every_field_of_open_clip_is_known() -> None:
    """A default changes nothing; another value is refused by its meaning, never as a misspelling."""
    fields = fields_of_open_clip()
    assert len(fields) > 80
    for section, key, default in fields:
        where = f"{section}.{key}".lstrip(".")
        if key in OURS[section]:
            continue
        assert CLIPConfig.from_open_clip(with_field(section, key, default)) == CLIPConfig.from_open_clip(TINY), where
        for value in ({"new": 1}, 7.5, "other"):
            cfg = with_field(section, key, value)
            if key in UNUSED[section]:
                assert CLIPConfig.from_open_clip(cfg) == CLIPConfig.from_open_clip(TINY), where
                continue
            with pytest.raises(ValueError, match=r"supported$") as raised:
                CLIPConfig.from_open_clip(cfg)
            assert where in str(raised.value) and "nearest" not in str(raised.value), raised.value


@pytest.mark.torch
@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_of_open_clip_is_built_or_named(name: str) -> None:
    cfg = json.loads(SHIPPED[name].read_text())
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    timm = vision.get("timm_model_name", "")
    if "multimodal_cfg" in cfg:
        expected = r"a CoCa \(it has a multimodal_cfg\)"
    elif timm and "siglip" not in timm:
        expected = rf"one with an image tower of timm \(vision_cfg\.timm_model_name is '{timm}'\)"
    elif name.startswith("RN"):
        expected = r"a ResNet \(vision_cfg\.layers is \["
    elif "hf_model_name" in text:
        expected = rf"one with a text tower of Hugging Face \(text_cfg\.hf_model_name is '{text['hf_model_name']}'\)"
    else:
        config = CLIPConfig.from_open_clip(cfg)
        assert (config.embed_dim, config.text.layers) == (cfg["embed_dim"], text.get("layers", 12))
        assert config.vision.layers == vision.get("layers", config.vision.layers)
        assert config.text.hf_tokenizer_name == text.get("hf_tokenizer_name", "")
        assert CLIPConfig.from_open_clip(config.to_open_clip()) == config
        return
    with pytest.raises(ValueError, match=expected) as raised:
        CLIPConfig.from_open_clip(cfg)
    assert str(raised.value).isprintable() and "nearest" not in str(raised.value)


@pytest.mark.torch
def test_all_are_there_and_71_are_ours() -> None:
    """45 with open_clip's own towers, 26 of SigLIP."""
    built = []
    for path in SHIPPED.values():
        with contextlib.suppress(ValueError):
            built.append(CLIPConfig.from_open_clip(json.loads(path.read_text())))
    assert (len(SHIPPED), len(built)) == (144, 71)
    assert sum(config.vision.pool_type == "map" for config in built) == 26


def test_a_misspelt_field_is_answered_by_the_nearest() -> None:
    for section, key, near in (
        ("vision_cfg", "layer", "layers"),
        ("text_cfg", "vocabsize", "vocab_size"),
        ("", "emb", "embed_dim"),
    ):
        with pytest.raises(ValueError, match=rf"has no '{key}': the nearest is '{near}'"):
            CLIPConfig.from_open_clip(with_field(section, key, 1))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_cfg", "norm_kwargs", {"eps": 1e-5}),
        ("vision_cfg", "act_kwargs", {"approximate": "none"}),
        ("text_cfg", "tokenizer_kwargs", {"clean": "lower"}),
        ("text_cfg", "hf_tokenizer_name", None),
        ("vision_cfg", "block_type", "default"),
        ("", "init_logit_scale", math.log(1 / 0.07)),
        ("", "init_logit_scale", 2.6592),
        ("vision_cfg", "patch_size", [8, 8]),
    ],
)
def test_a_value_that_means_the_same(section: str, key: str, value: Any) -> None:
    assert CLIPConfig.from_open_clip(with_field(section, key, value)) == CLIPConfig.from_open_clip(TINY)


def test_what_only_training_reads_is_taken_with_weights() -> None:
    for section, key, value in (
        ("vision_cfg", "patch_dropout", 0.5),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d"),
        ("", "init_logit_scale", 4.6),
    ):
        cfg = with_field(section, key, value)
        assert native_cfg(cfg, trained=True) == TINY
        with pytest.raises(ValueError, match=rf"{key} is .*: open_clip then .*, which is not supported"):
            CLIPConfig.from_open_clip(cfg)


@pytest.mark.torch
@pytest.mark.parametrize(("width", "head_width"), [(100, 64), (96, 40), (64, 64)])
def test_heads_are_counted_as_by_open_clip(width: int, head_width: int) -> None:
    """If the head width does not divide the width, heads are wider."""
    import open_clip

    cfg = copy.deepcopy(TINY)
    cfg["vision_cfg"] |= {"width": width, "head_width": head_width}
    heads = open_clip.CLIP(**cfg).visual.transformer.resblocks[0].attn.num_heads
    assert CLIPConfig.from_open_clip(cfg).vision.heads == heads
