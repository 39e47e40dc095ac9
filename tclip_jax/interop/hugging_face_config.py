"""Write the config.json of transformers' CLIPModel or SiglipModel, and read it, with the defaults of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tclip_jax.data.tokenizer import EOT, SOT, VOCAB_SIZE
from tclip_jax.interop.hugging_face import check_hugging_face
from tclip_jax.interop.open_clip import is_timm, mlp_ratio
from tclip_jax.interop.reader import check_object
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

# Names of transformers for each of our activations, the one that is written first.
_ACTIVATIONS = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
    "quick_gelu": ("quick_gelu",),
}

# Defaults of transformers, whose files may omit fields that equal them.
_PROJECTION = 512
_VISION: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_CLIP: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "vision_config": {**_VISION, **_CLIP, "patch_size": 32},
        "text_config": {
            **_CLIP,
            "num_hidden_layers": 12,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 77,
            "eos_token_id": EOT,
        },
    },
    "siglip": {
        "vision_config": {**_VISION, **_SIGLIP, "patch_size": 16, "vision_use_head": True},
        "text_config": {
            **_SIGLIP,
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "vocab_size": 32000,
            "max_position_embeddings": 64,
        },
    },
}
_SIGLIP_OPTIONS = {
    "vision_cfg": {
        "pool_type": "map",
        "class_token": False,
        "patch_bias": True,
        "no_ln_pre": True,
        "projection": False,
    },
    "text_cfg": {
        "pool_type": "last",
        "no_causal_mask": True,
        "proj_bias": True,
        "hf_tokenizer_name": "SiglipTokenizer",
    },
}


def hugging_face_config(config: CLIPConfig, dtype: str = "float32") -> dict[str, Any]:
    """Return the config.json of transformers' CLIPModel or SiglipModel.

    Args:
      config: the model.
      dtype: dtype of the stored weights.

    Raises:
      ValueError: neither can express the model; the message names the option.
    """
    check_hugging_face(config)
    vision, text = config.vision, config.text
    document: dict[str, Any] = {"torch_dtype": dtype}
    vision_config = {
        "image_size": vision.image_size[0],
        "patch_size": vision.patch_size,
        "num_channels": 3,
        **_written(config, vision),
    }
    text_config = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        **_written(config, text),
    }
    if is_timm(config):
        vision_config |= {"model_type": "siglip_vision_model", "vision_use_head": True}
        text_config |= {"model_type": "siglip_text_model", "projection_size": config.embed_dim}
        # SigLIP's tokenizer pads texts with their last token. The defaults of transformers are above the vocabulary.
        text_config |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
        document |= {"architectures": ["SiglipModel"], "model_type": "siglip"}
        return document | {"vision_config": vision_config, "text_config": text_config}
    if text.vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"text_cfg.vocab_size is {text.vocab_size}: transformers' CLIPModel pools a text at token {EOT}, so it must"
            f" be at least {VOCAB_SIZE}"
        )
    projection = {"projection_dim": config.embed_dim}
    vision_config |= {"model_type": "clip_vision_model", **projection}
    text_config |= {"model_type": "clip_text_model", **projection}
    text_config |= {"bos_token_id": SOT, "eos_token_id": EOT, "pad_token_id": EOT}
    document |= {"architectures": ["CLIPModel"], "model_type": "clip", "logit_scale_init_value": math.log(1 / 0.07)}
    return document | projection | {"vision_config": vision_config, "text_config": text_config}


def _written(config: CLIPConfig, tower: VisionConfig | TextConfig) -> dict[str, Any]:
    """Return the fields of a tower; all of them, because the defaults differ between versions of transformers."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": _ACTIVATIONS[config.activation(tower)][0],
        "layer_norm_eps": tower.norm_eps,
        "attention_dropout": 0.0,
    }


def config_from_hugging_face(document: Mapping[str, Any]) -> CLIPConfig:
    """Return the model of a config.json, the inverse of `hugging_face_config`.

    Omitted fields have the defaults of transformers' CLIPConfig or SiglipConfig.

    Raises:
      ValueError: the model is neither a CLIPModel nor a SiglipModel, or has a value that is not supported.
    """
    kind = document.get("model_type", "clip")
    if kind == "siglip2":
        raise ValueError(
            "model_type is 'siglip2', a NaFlex model for images of any shape: only those of one size are read, whose"
            " model_type is 'siglip'"
        )
    if not isinstance(kind, str) or kind not in _TOWERS:
        raise ValueError(
            f"model_type is {kind!r:.80}: only 'clip' and 'siglip', a CLIPModel or SiglipModel of two towers, are read"
        )
    vision, text = _tower(document, "vision_config", kind), _tower(document, "text_config", kind)
    try:
        for key, tower in (("vision_config", vision), ("text_config", text)):
            width, heads = tower["hidden_size"], tower["num_attention_heads"]
            if width % heads:
                raise ValueError(f"{key}.hidden_size is {width}: it is not divisible by {heads} heads")
        if vision["num_channels"] != 3:
            raise ValueError(f"vision_config.num_channels is {vision['num_channels']!r:.80}: it must be 3")
        quick = _is_quick(vision["hidden_act"], text["hidden_act"])
        model: dict[str, Any] = {
            "vision_cfg": {
                "image_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                **_transformer(vision),
            },
            "text_cfg": {
                "context_length": text["max_position_embeddings"],
                "vocab_size": text["vocab_size"],
                "heads": text["num_attention_heads"],
                **_transformer(text),
            },
            "quick_gelu": quick,
        }
        if kind == "clip":
            _check_end(text["eos_token_id"], text["vocab_size"])
            return CLIPConfig.from_open_clip({"embed_dim": document.get("projection_dim", _PROJECTION), **model})
        if not vision["vision_use_head"]:
            raise ValueError("vision_config.vision_use_head is false: only models with attention pooling are read")
        for section, options in _SIGLIP_OPTIONS.items():
            model[section] |= options
        embed_dim = text.get("projection_size")
        embed_dim = text["hidden_size"] if embed_dim is None else embed_dim
        return CLIPConfig.from_open_clip({"embed_dim": embed_dim, "init_logit_bias": -10.0, **model})
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"not the config of a CLIPModel or SiglipModel: {error}") from None


def activations(document: Mapping[str, Any]) -> set[str]:
    """Return the names of both towers' activations in a config.json, as ours if they are known."""
    kind = document.get("model_type", "clip")
    towers = (str(_tower(document, name, kind)["hidden_act"]) for name in ("vision_config", "text_config"))
    return {_activation(name) or name for name in towers}


def _tower(document: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """Return a tower's section with defaults filled in. As in transformers, an older `…_dict` section replaces it."""
    section = document.get(name) if document.get(f"{name}_dict") is None else document[f"{name}_dict"]
    if section is None:
        section = {}
    check_object(name, section)
    return _TOWERS[kind][name] | section


def _activation(name: Any) -> str | None:
    return next((ours for ours, names in _ACTIVATIONS.items() if name in names), None)


def _is_quick(*names: Any) -> bool:
    """Whether both towers have QuickGELU.

    Raises:
      ValueError: an activation is not known, or only one tower has QuickGELU.
    """
    if any(_activation(name) is None for name in names) or len({name == "quick_gelu" for name in names}) > 1:
        stated = " and ".join(sorted({f"{name!r:.80}" for name in names}))
        known = ", ".join(name for names in _ACTIVATIONS.values() for name in names if name != "quick_gelu")
        raise ValueError(f"hidden_act is {stated}: both towers must have 'quick_gelu', or each one of {known}")
    return names[0] == "quick_gelu"


def _check_end(eos: Any, vocab_size: Any) -> None:
    """Raise ValueError unless transformers pools a text at its largest token id, as this project does."""
    # For the value 2, in older files, transformers pools at the largest id, which is the end of text.
    if eos == 2 or (eos == vocab_size - 1 and vocab_size <= VOCAB_SIZE):
        return
    if eos != EOT:
        raise ValueError(f"text_config.eos_token_id is {eos!r:.80}: it must be {EOT}")
    if vocab_size <= EOT:
        raise ValueError(f"text_config.eos_token_id is {EOT}: it must be below the vocab_size, {vocab_size}")


def _transformer(tower: Mapping[str, Any]) -> dict[str, Any]:
    tanh = _activation(tower["hidden_act"]) == "gelu_tanh"
    return {
        "width": tower["hidden_size"],
        "layers": tower["num_hidden_layers"],
        "mlp_ratio": mlp_ratio(tower["hidden_size"], tower["intermediate_size"]),
        "norm_eps": tower["layer_norm_eps"],
        "approximate": "tanh" if tanh else "none",
    }
