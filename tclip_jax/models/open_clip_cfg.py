"""Conversion of open_clip's `model_cfg` to the fields of CLIPConfig; all other fields are checked by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tclip_jax.models.timm_cfg import from_timm, is_timm_siglip

# Fields from `global_average_pool` to `correct_cls_mask` belong to older versions of open_clip.


class _Field(NamedTuple):
    """A field of open_clip that CLIPConfig lacks.

    Attributes:
      meaning: what open_clip does if the value is not in `same`.
      same: values that do not change the model; empty if no value does.
    """

    meaning: str
    same: tuple[Any, ...]


_ATTENTION = {
    "block_type": _Field("builds its attention blocks in another way", (None, "default")),
    "qk_norm": _Field("normalises queries and keys", (False, None)),
    "scaled_cosine_attn": _Field("attends by cosine similarity", (False, None)),
    "scale_heads": _Field("scales each attention head", (False, None)),
    "scale_attn_inner": _Field("normalises what attention gives before its output projection", (False, None)),
    "scale_attn": _Field("normalises what attention gives", (False, None)),
    "scale_fc": _Field("normalises the hidden layer of the MLPs", (False, None)),
    "output_tokens": _Field("also returns the embedding of each token", (False, None)),
}
_MODEL = {
    # The model is the same, but names of its text tower's parameters start with "text.".
    "custom_text": _Field("", ()),
    "nonscalar_logit_scale": _Field("", ()),
    "output_dict": _Field("", ()),
    "cast_dtype": _Field("computes in another dtype", (None,)),
    "init_logit_scale": _Field("starts training at another logit scale", (None, math.log(1 / 0.07), math.log(10))),
}
_VISION = _ATTENTION | {
    "patch_dropout": _Field("leaves out patches in training", (0, None)),
    "attentional_pool": _Field("pools by attention, as CoCa does", (False, None, "")),
    "pos_embed_type": _Field("computes the position embeddings instead of learning them", ("learnable",)),
    "global_average_pool": _Field("averages all tokens, the class token too", (False, None)),
    "input_patchnorm": _Field("normalises patches before they are embedded", (False, None)),
    # Unused without attentional_pool and timm_model_name.
    **dict.fromkeys(("attn_pooler_queries", "attn_pooler_heads", "n_queries"), _Field("", ())),
    **dict.fromkeys(("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj"), _Field("", ())),
    **dict.fromkeys(("timm_proj_bias", "timm_drop", "timm_drop_path"), _Field("", ())),
}
_TEXT = _ATTENTION | {
    "tokenizer_kwargs": _Field(
        "changes the tokenizer by these options", (None, {}, {"clean": "lower"}, {"reduction_mask": ""})
    ),
    "embed_cls": _Field("appends a class token to texts, as CoCa does", (False, None)),
    "use_pad_mask": _Field("masks padding", (False, None)),
    # Unused without such a tokenizer, embed_cls and hf_model_name; open_clip itself does not use the last.
    **dict.fromkeys(("tokenizer_mode", "pad_id", "correct_cls_mask"), _Field("", ())),
    **dict.fromkeys(
        ("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "pooler_type", "proj", "final_ln_after_pool"),
        _Field("", ()),
    ),
    "hf_model_name": _Field("", (None, "")),
}
# They affect only training or its start: trained weights already hold their effect.
_TRAINING = {"init_logit_scale", "patch_dropout", "pos_embed_type"}


def native_cfg(model_cfg: Mapping[str, Any], *, trained: bool = False) -> dict[str, Any]:
    """Convert a `model_cfg` of open_clip to the fields of CLIPConfig.

    Unknown fields stay; the caller refuses them.

    Args:
      model_cfg: as in open_clip_config.json and open_clip's model_configs.
      trained: whether the model has trained weights, so that fields that affect only training may have any value.

    Returns:
      The same model in the fields of CLIPConfig.

    Raises:
      ValueError: the model is of another kind (ResNet, timm, Hugging Face, CoCa), or a field has a value that
        is not supported; the message has its meaning in open_clip.
    """
    model = dict(model_cfg)
    sections = {name: model[name] for name in ("vision_cfg", "text_cfg") if isinstance(model.get(name), Mapping)}
    _check_kind(model, sections.get("vision_cfg", {}), sections.get("text_cfg", {}))
    model.pop("multimodal_cfg", None)
    for name, fields in (("vision_cfg", _VISION), ("text_cfg", _TEXT)):
        if name in sections:
            section = _native_kwargs(sections[name], f"{name}.")
            if is_timm_siglip(section.get("timm_model_name")):
                section = from_timm(section)
            if section.get("hf_tokenizer_name"):
                section.pop("tokenizer_kwargs", None)  # of that tokenizer
            elif section.get("hf_tokenizer_name", "") is None:
                del section["hf_tokenizer_name"]
            model[name] = _without(section, fields, f"{name}.", trained)
            if name == "text_cfg":
                _name_end(model[name])
    model = _without(model, _MODEL, "", trained)
    if "vision_cfg" in sections:
        _make_square(model["vision_cfg"])
    return model


def _native_kwargs(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert `norm_kwargs` and `act_kwargs`, the arguments of PyTorch's LayerNorm and GELU, to our fields."""
    native = dict(section)
    for name, argument, field in (("norm_kwargs", "eps", "norm_eps"), ("act_kwargs", "approximate", "approximate")):
        kwargs = native.pop(name, None) or {}
        if not isinstance(kwargs, Mapping) or kwargs.keys() - {argument}:
            raise ValueError(f"{where}{name} is {kwargs!r:.60}: only {argument} is supported")
        native |= {field: kwargs[argument]} if argument in kwargs else {}
    return native


def _check_kind(model: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    timm, layers, hugging_face = vision.get("timm_model_name"), vision.get("layers"), text.get("hf_model_name")
    reason = None
    if model.get("multimodal_cfg"):
        reason = "a CoCa (it has a multimodal_cfg)"
    elif timm and not is_timm_siglip(timm):
        reason = f"one with an image tower of timm (vision_cfg.timm_model_name is {timm!r:.60})"
    elif isinstance(layers, list | tuple):
        reason = f"a ResNet (vision_cfg.layers is {layers!s:.60})"
    elif hugging_face:
        reason = f"one with a text tower of Hugging Face (text_cfg.hf_model_name is {hugging_face!r:.60})"
    if reason:
        raise ValueError(
            f"the model is {reason}: only CLIPs with open_clip's own transformers, and SigLIPs, are supported"
        )


def _without(section: Mapping[str, Any], fields: Mapping[str, _Field], where: str, trained: bool) -> dict[str, Any]:
    """Remove these fields from the section, after a check that they do not change the model."""
    for key, field in fields.items():
        skipped = not field.same or (trained and key in _TRAINING)
        if key in section and not skipped and not any(_same(section[key], value) for value in field.same):
            raise ValueError(
                f"{where}{key} is {section[key]!r:.60}: open_clip then {field.meaning}, which is not supported"
            )
    return {key: value for key, value in section.items() if key not in fields}


def _same(stated: Any, value: Any) -> bool:
    if isinstance(value, float) and isinstance(stated, float):
        return math.isclose(stated, value, rel_tol=1e-4)
    return stated == value


def _name_end(text: dict[str, Any]) -> None:
    """Keep `eos_id` only if a text is pooled there, and rename "eos" to "argmax" if both select the same token."""
    if text.get("pool_type") != "eos":
        if type(text.get("eos_id")) is int and text["eos_id"] >= 0:  # another value is refused
            del text["eos_id"]
    elif text.get("eos_id") == text.get("vocab_size", 49408) - 1:
        del text["eos_id"]
        text["pool_type"] = "argmax"


def _make_square(vision: dict[str, Any]) -> None:
    """Convert the size of square patches to one number, and the head width to the one that open_clip uses.

    From a head width that does not divide the width, open_clip derives a larger one.
    """
    patch, width, head_width = (vision.get(key) for key in ("patch_size", "width", "head_width"))
    if isinstance(patch, list | tuple) and len(patch) == 2 and patch[0] == patch[1]:
        vision["patch_size"] = patch[0]
    if type(width) is type(head_width) is int and 0 < head_width <= width and width % (width // head_width) == 0:
        vision["head_width"] = width // (width // head_width)
