"""What a checkpoint says of its model beside the weights, and what a preset says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from tclip_jax.data.images import Preprocess
from tclip_jax.data.tokenizer import EOT
from tclip_jax.interop.open_clip import mlp_ratio
from tclip_jax.interop.reader import read_json
from tclip_jax.interop.torchscript import torchscript_activation
from tclip_jax.lazy import LazyArray
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"

_ACTIVATIONS = {"gelu": False, "quick_gelu": True}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}


class Metadata(NamedTuple):
    """A model's shape with its activation, and the preprocessing of its images."""

    config: CLIPConfig
    preprocess: Preprocess


def from_name(name: str) -> Metadata:
    """Of a preset, or of an open_clip JSON file: a `model_cfg`, or an object with that and `preprocess_cfg`.

    Raises:
      ValueError: no such preset, or a model that this project does not have.
      FileNotFoundError: no such file.
    """
    if not name.endswith(".json"):
        return _open_clip(name, model_cfg(name), {})
    document = read_json(epath.Path(name))
    return _open_clip(name, document.get("model_cfg", document), document.get("preprocess_cfg", {}))


def from_open_clip(folder: epath.Path) -> Metadata:
    """Of a folder with open_clip_config.json; a config.json beside it must name the same activation.

    Raises:
      ValueError: a file that is damaged, contradicts the other, or describes a model that this project does not have.
    """
    document, beside = read_json(folder / OPEN_CLIP), folder / HUGGING_FACE
    metadata = _open_clip(str(folder / OPEN_CLIP), document.get("model_cfg", {}), document.get("preprocess_cfg", {}))
    if beside.exists():
        stated = _activations(read_json(beside))
        if stated and stated != {"quick_gelu" if metadata.config.quick_gelu else "gelu"}:
            raise ValueError(
                f"{beside} has hidden_act {', '.join(sorted(stated))}, but {OPEN_CLIP} says"
                f" quick_gelu {metadata.config.quick_gelu}: the activation must be one"
            )
    return metadata


def from_hugging_face(folder: epath.Path) -> Metadata:
    """Of a folder that transformers' CLIPModel wrote.

    Raises:
      ValueError: a file that is missing, damaged, or describes a model that this project does not have.
    """
    path = folder / HUGGING_FACE
    document = read_json(path)
    try:
        config = config_from_hugging_face(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).exists():
            document = read_json(folder / name)
            try:
                return Metadata(config, preprocess_from_hugging_face(document[key] if key else document))
            except KeyError as error:
                raise ValueError(f"{folder / name} lacks {error}") from None
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name}: {error}") from None
    raise ValueError(f"{folder} lacks preprocessor_config.json: it holds the mean and deviation of the model's images")


def from_torchscript(path: epath.Path, tensors: Mapping[str, LazyArray]) -> Metadata | None:
    """Of an archive of OpenAI: shapes, heads of width 64, and the activation of its program; None if that is unclear.

    Raises:
      ValueError: no CLIP with two transformers.
    """
    activation = torchscript_activation(path)
    if activation is None:
        return None
    try:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        context, text_width = tensors["positional_embedding"].shape
        image = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1) * patch
        vision = {"image_size": image, "patch_size": patch, "width": width, "layers": _layers(tensors, "visual.")}
        text = {
            "context_length": context,
            "vocab_size": tensors["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": _layers(tensors, ""),
        }
        embed_dim = tensors["text_projection"].shape[1]
    except (LookupError, ValueError) as error:
        raise ValueError(f"{path} is no CLIP with two transformers: {error}") from None
    model = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": activation}
    return _open_clip(str(path), model, {})


def config_from_hugging_face(document: Mapping[str, Any]) -> CLIPConfig:
    """The model of a config.json, the inverse of `hugging_face_config`.

    Raises:
      ValueError: a key that is missing, or a value that no model of this project has. The library's default
        activation is not relied on: it must be written in both towers.
    """
    if document.get("model_type") != "clip":
        raise ValueError(f"model_type is {document.get('model_type')!r}: only 'clip' is read")
    try:
        vision, text = document["vision_config"], document["text_config"]
        activations = {vision["hidden_act"], text["hidden_act"]}
        for key, tower in (("vision_config", vision), ("text_config", text)):
            if tower["layer_norm_eps"] != 1e-5:
                raise ValueError(f"{key}.layer_norm_eps is {tower['layer_norm_eps']}: it must be 1e-05")
            width, heads = tower["hidden_size"], tower["num_attention_heads"]
            if width % heads:
                raise ValueError(f"{key}.hidden_size is {width}: it is not divisible by {heads} heads")
        if len(activations) > 1 or not activations <= _ACTIVATIONS.keys():
            names = " and ".join(sorted(map(repr, activations)))
            raise ValueError(f"hidden_act is {names}: both towers must have 'gelu', or both 'quick_gelu'")
        # 2 is what old files say, and the library then looks for the largest token, which is the end of text.
        if text.get("eos_token_id", EOT) not in (2, EOT):
            raise ValueError(f"text_config.eos_token_id is {text['eos_token_id']}: it must be {EOT}")
        return CLIPConfig.from_open_clip(
            {
                "embed_dim": document["projection_dim"],
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
    except KeyError as error:
        raise ValueError(f"lacks {error}") from None
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"not the config of a CLIPModel: {error}") from None


def preprocess_from_hugging_face(fields: Mapping[str, Any]) -> Preprocess:
    """The preprocessing of a preprocessor_config.json, the inverse of `Preprocess.to_hugging_face`.

    Raises:
      ValueError: a preprocessing that open_clip does not have.
      KeyError: a missing key.
    """
    _check_object("the preprocessing", fields)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not fields.get(key, True):
            raise ValueError(f"{key} is false: it must be true")
    if not math.isclose(fields.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"rescale_factor is {fields['rescale_factor']}: it must be 1/255")
    if fields.get("resample", 3) not in _INTERPOLATIONS:
        raise ValueError(f"resample is {fields['resample']}: it must be 2 (bilinear) or 3 (bicubic)")
    size, crop = _sides(fields["size"]), _sides(fields["crop_size"])
    squash = isinstance(fields["size"], Mapping) and "height" in fields["size"]
    if size != crop or not (squash or fields.get("do_center_crop", True)):
        raise ValueError(f"size {fields['size']} and crop_size {fields['crop_size']} give no images of one size")
    return Preprocess(
        size,
        fields["image_mean"],
        fields["image_std"],
        _INTERPOLATIONS[fields.get("resample", 3)],
        "squash" if squash else "shortest",
    )


def _open_clip(where: str, model: Any, pixels: Any) -> Metadata:
    try:
        _check_object("model_cfg", model)
        _check_object("preprocess_cfg", pixels)
        config = CLIPConfig.from_open_clip(model)
        return Metadata(config, Preprocess.from_open_clip(pixels, config.vision.image_size))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.80}: it must be a JSON object")


def _layers(tensors: Mapping[str, LazyArray], prefix: str) -> int:
    return sum(key.startswith(f"{prefix}transformer.") and key.endswith("ln_1.weight") for key in tensors)


def _activations(document: Mapping[str, Any]) -> set[str]:
    towers = (document.get("vision_config"), document.get("text_config"))
    return {str(tower["hidden_act"]) for tower in towers if isinstance(tower, dict) and "hidden_act" in tower}


def _transformer(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": tower["hidden_size"],
        "layers": tower["num_hidden_layers"],
        "mlp_ratio": mlp_ratio(tower["hidden_size"], tower["intermediate_size"]),
    }


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
    return (size, size)
