"""Write CLIPModel's config.json, and read it and preprocessor_config.json, with the defaults of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from tclip_jax.data.tokenizer import EOT, SOT, VOCAB_SIZE
from tclip_jax.interop.open_clip import check_expressible, mlp_ratio
from tclip_jax.interop.reader import check_object
from tclip_jax.models.config import CLIPConfig

_ACTIVATIONS = {"gelu": False, "quick_gelu": True}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}

# Defaults of transformers, whose files may omit fields that equal them.
_PROJECTION = 512
EPSILON = 1e-5  # of every LayerNorm; the only one that is supported
_TOWER: dict[str, Any] = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": EPSILON}
_TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {
        **_TOWER,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
    },
    "text_config": {
        **_TOWER,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 77,
        "eos_token_id": EOT,
    },
}
_PREPROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
}


def hugging_face_config(config: CLIPConfig, dtype: str = "float32") -> dict[str, Any]:
    """Return the config.json of transformers' CLIPModel.

    Args:
      config: the model.
      dtype: dtype of the stored weights.

    Raises:
      ValueError: CLIPModel cannot express the model; the message names the option.
    """
    check_expressible(config, "transformers' CLIPModel")
    vision, text = config.vision, config.text
    if text.vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"text_cfg.vocab_size is {text.vocab_size}: transformers' CLIPModel pools a text at token {EOT}, so it must"
            f" be at least {VOCAB_SIZE}"
        )
    # State every field, because the defaults differ between versions of transformers.
    shared = {
        "projection_dim": config.embed_dim,
        "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
        "layer_norm_eps": EPSILON,
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),
        "torch_dtype": dtype,
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size,
            "num_channels": 3,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            **shared,
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "bos_token_id": SOT,
            "eos_token_id": EOT,
            "pad_token_id": EOT,
            **shared,
        },
    }


def config_from_hugging_face(document: Mapping[str, Any]) -> CLIPConfig:
    """Return the model of a config.json, the inverse of `hugging_face_config`.

    Omitted fields have the defaults of transformers' CLIPConfig.

    Raises:
      ValueError: the model is not a CLIPModel, or has a value that is not supported.
    """
    kind = document.get("model_type", "clip")
    if kind != "clip":
        raise ValueError(f"model_type is {kind!r:.80}: only 'clip', a CLIPModel of two towers, is read")
    vision, text = _tower(document, "vision_config"), _tower(document, "text_config")
    try:
        activations = {vision["hidden_act"], text["hidden_act"]}
        for key, tower in (("vision_config", vision), ("text_config", text)):
            if tower["layer_norm_eps"] != EPSILON:
                raise ValueError(f"{key}.layer_norm_eps is {tower['layer_norm_eps']!r:.80}: it must be {EPSILON}")
            width, heads = tower["hidden_size"], tower["num_attention_heads"]
            if width % heads:
                raise ValueError(f"{key}.hidden_size is {width}: it is not divisible by {heads} heads")
        if len(activations) > 1 or not activations <= _ACTIVATIONS.keys():
            names = " and ".join(sorted(f"{name!r:.80}" for name in activations))
            raise ValueError(f"hidden_act is {names}: both towers must have 'gelu', or both 'quick_gelu'")
        if vision["num_channels"] != 3:
            raise ValueError(f"vision_config.num_channels is {vision['num_channels']!r:.80}: it must be 3")
        _check_end(text["eos_token_id"], text["vocab_size"])
        return CLIPConfig.from_open_clip(
            {
                "embed_dim": document.get("projection_dim", _PROJECTION),
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
                "quick_gelu": _ACTIVATIONS[activations.pop()],
            }
        )
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"not the config of a CLIPModel: {error}") from None


def preprocess_from_hugging_face(fields: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a preprocessor_config.json, the inverse of `Preprocess.to_hugging_face`.

    A file of CLIPImageProcessor may omit fields that equal the defaults of that class.

    Raises:
      ValueError: open_clip cannot express the preprocessing, or a file of another class omits a required field.
    """
    check_object("the preprocessing", fields)
    stated = {key: value for key, value in fields.items() if value is not None}
    processor = str(stated.get("image_processor_type", stated.get("feature_extractor_type", "CLIP")))
    is_clip = processor.startswith("CLIP")
    missing = [key for key in ("size", "resample", "image_mean", "image_std") if key not in stated]
    if not is_clip and missing:
        raise ValueError(
            f"lacks {missing[0]}: only for CLIPImageProcessor is the default known, not for {processor!r:.80}"
        )
    known = _PREPROCESSOR | {"do_center_crop": is_clip} | stated
    for key in ("do_resize", "do_rescale"):
        if not known[key]:
            raise ValueError(f"{key} is false: it must be true")
    if known.get("use_square_size"):
        raise ValueError("use_square_size is true: write the height and width as size")
    factor, resample = known["rescale_factor"], known["resample"]
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor is {factor!r:.80}: it must be 1/255")
    if resample not in list(_INTERPOLATIONS):
        raise ValueError(f"resample is {resample!r:.80}: it must be 2 (bilinear) or 3 (bicubic)")
    size, squash = _sides("size", known["size"], square=not is_clip)
    crop = _sides("crop_size", known["crop_size"], square=True)[0] if known["do_center_crop"] else None
    if crop is None and not squash:
        raise ValueError(
            f"size {known['size']!r:.80} is the shorter side and do_center_crop is false: the images have no fixed size"
        )
    if crop not in (None, size):
        raise ValueError(
            f"size {known['size']!r:.80} and crop_size {known['crop_size']!r:.80} differ: they must be equal"
        )
    normalized = known["do_normalize"]
    return Preprocess(
        size,
        known["image_mean"] if normalized else (0.0,) * 3,
        known["image_std"] if normalized else (1.0,) * 3,
        _INTERPOLATIONS[resample],
        "squash" if squash else "shortest",
    )


def _tower(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tower's section with defaults filled in. As in transformers, an older `…_dict` section replaces it."""
    section = document.get(name) if document.get(f"{name}_dict") is None else document[f"{name}_dict"]
    if section is None:
        section = {}
    check_object(name, section)
    return _TOWERS[name] | section


def activations(document: Mapping[str, Any]) -> set[str]:
    """Return the names of both towers' activations in a config.json."""
    return {str(_tower(document, name)["hidden_act"]) for name in _TOWERS}


def norm_epsilons(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the epsilon of the LayerNorms in a config.json, for the towers "vision" and "text"."""
    return {name.removesuffix("_config"): _tower(document, name)["layer_norm_eps"] for name in _TOWERS}


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
    return {
        "width": tower["hidden_size"],
        "layers": tower["num_hidden_layers"],
        "mlp_ratio": mlp_ratio(tower["hidden_size"], tower["intermediate_size"]),
    }


def _sides(name: str, size: Any, square: bool) -> tuple[tuple[int, int], bool]:
    """Return height and width, and whether both are fixed; one number means both if `square`, else the shorter side."""
    if isinstance(size, Mapping) and size.keys() == {"shortest_edge"}:
        return (size["shortest_edge"],) * 2, False
    if isinstance(size, Mapping) and size.keys() == {"height", "width"}:
        return (size["height"], size["width"]), True
    if isinstance(size, list | tuple) and len(size) == 2:
        return (size[0], size[1]), True
    if type(size) is not int:
        raise ValueError(f"{name} is {size!r:.80}: it must be a number, shortest_edge alone, or height and width")
    return (size, size), square
