"""What a checkpoint says of its model beside the weights, and what a preset says."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import activations, config_from_hugging_face, preprocess_from_hugging_face
from tclip_jax.interop.reader import check_object, read_json
from tclip_jax.interop.torchscript import torchscript_activation
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.models.presets import model_cfg

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"

_log = logging.getLogger(__name__)


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
        stated, document = set(), read_json(beside)
        if document.get("model_type") == "clip":
            stated = activations(document)
        if stated and stated != {"quick_gelu" if metadata.config.quick_gelu else "gelu"}:
            raise ValueError(
                f"{beside} has hidden_act {', '.join(sorted(stated)):.80}, but {OPEN_CLIP} says"
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
        document = read_json(folder / name) if (folder / name).exists() else {}
        # Older versions wrote a processor_config.json without images.
        if document and (key is None or key in document):
            try:
                return Metadata(config, preprocess_from_hugging_face(document[key] if key else document))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name}: {error}") from None
    assumed = Preprocess(config.vision.image_size)
    _log.warning("%s has no preprocessor_config.json: assumed are CLIPImageProcessor's defaults, %s", folder, assumed)
    return Metadata(config, assumed)


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


def _open_clip(where: str, model: Any, pixels: Any) -> Metadata:
    try:
        check_object("model_cfg", model)
        check_object("preprocess_cfg", pixels)
        config = CLIPConfig.from_open_clip(native_cfg(model, trained=True))
        return Metadata(config, Preprocess.from_open_clip(pixels, config.vision.image_size))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _layers(tensors: Mapping[str, LazyArray], prefix: str) -> int:
    return sum(key.startswith(f"{prefix}transformer.") and key.endswith("ln_1.weight") for key in tensors)
