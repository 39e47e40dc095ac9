"""Read a model's configuration and preprocessing from the metadata of a checkpoint, or from a preset."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.hugging_face_config import activations, config_from_hugging_face
from tclip_jax.interop.hugging_face_preprocess import preprocess_from_hugging_face
from tclip_jax.interop.open_clip import is_timm
from tclip_jax.interop.reader import check_object, read_json
from tclip_jax.interop.torchscript import torchscript_activation
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.open_clip_cfg import native_cfg
from tclip_jax.models.presets import model_cfg, preprocess_cfg

OPEN_CLIP, HUGGING_FACE = "open_clip_config.json", "config.json"

_log = logging.getLogger(__name__)


class Metadata(NamedTuple):
    """A model's configuration, and the preprocessing of its images.

    Attributes:
      config: the configuration.
      preprocess: the preprocessing.
      assumed: whether the source does not state the preprocessing, which is CLIP's default then.
    """

    config: CLIPConfig
    preprocess: Preprocess
    assumed: bool = False


def from_name(name: str) -> Metadata:
    """Return the metadata of a preset or a JSON file of open_clip.

    Args:
      name: a preset, or a path that ends in .json: a `model_cfg`, or an object with `model_cfg` and `preprocess_cfg`.

    Raises:
      ValueError: the preset does not exist, or the model is not supported.
      FileNotFoundError: the file does not exist.
    """
    if not name.endswith(".json"):
        pixels = preprocess_cfg(name)
        # All SigLIPs have the same preprocessing; CLIP's is only the most common.
        return parse_open_clip(name, model_cfg(name), pixels)._replace(assumed=pixels == preprocess_cfg())
    document = read_json(epath.Path(name))
    metadata = parse_open_clip(name, document.get("model_cfg", document), document.get("preprocess_cfg", {}))
    return metadata._replace(assumed="preprocess_cfg" not in document)


def from_open_clip(folder: epath.Path) -> Metadata:
    """Return the metadata in a folder's open_clip_config.json.

    Raises:
      ValueError: the file is damaged, the model is not supported, or a config.json next to it has another activation.
    """
    document, beside = read_json(folder / OPEN_CLIP), folder / HUGGING_FACE
    metadata = parse_open_clip(
        str(folder / OPEN_CLIP), document.get("model_cfg", {}), document.get("preprocess_cfg", {})
    )
    if beside.exists():
        stated, document = set(), read_json(beside)
        if document.get("model_type") in ("clip", "siglip"):
            stated = activations(document)
        config = metadata.config
        # open_clip's configurations of SigLIP leave out the approximation of the image tower, and some of the text's.
        if (
            stated
            and not is_timm(config)
            and stated != {config.activation(config.vision), config.activation(config.text)}
        ):
            raise ValueError(
                f"{beside} has hidden_act {', '.join(sorted(stated)):.80}, but {OPEN_CLIP} has"
                f" quick_gelu {config.quick_gelu}: both must name the same activation"
            )
    return metadata


def from_hugging_face(folder: epath.Path) -> Metadata:
    """Return the metadata in a folder that transformers' CLIPModel or SiglipModel saved.

    Without preprocessor_config.json, the preprocessing is CLIP's default: that of CLIPImageProcessor at the model's
    image size.

    Raises:
      ValueError: a file is damaged, or the model or its preprocessing is not supported.
    """
    path = folder / HUGGING_FACE
    document = read_json(path)
    try:
        config = config_from_hugging_face(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    preprocess = preprocess_of(folder)
    if preprocess is None:
        return Metadata(config, Preprocess(config.vision.image_size), assumed=True)
    return Metadata(config, preprocess)


def preprocess_of(folder: epath.Path) -> Preprocess | None:
    """Return the preprocessing in the files of transformers in a folder; None if it has no such file.

    Raises:
      ValueError: a file is damaged, or the preprocessing is not supported.
    """
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        document = read_json(folder / name) if (folder / name).exists() else {}
        # Older versions of transformers wrote a processor_config.json without "image_processor".
        if document and (key is None or key in document):
            try:
                return preprocess_from_hugging_face(document[key] if key else document)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{folder / name}: {error}") from None
    return None


def warn_of_assumption(source: epath.PathLike, assumed: Preprocess) -> None:
    """Log the default preprocessing of a source without a preprocessor file."""
    _log.warning(
        "%s has no preprocessor_config.json: assuming CLIP's preprocessing: %s resize of the shorter side and center"
        " crop to %dx%d, mean (%s), std (%s)",
        source,
        assumed.interpolation,
        *assumed.size,
        *(", ".join(map(str, values)) for values in (assumed.mean, assumed.std)),
    )


def warn_of_contradiction(folder: epath.Path, library: str, config: CLIPConfig) -> None:
    """Log where the other library's metadata in a folder, if there is any, describes another model than the one read.

    Args:
      folder: the folder.
      library: OPEN_CLIP or HUGGING_FACE, whose metadata is read.
      config: the model that it describes.
    """
    other, read = (HUGGING_FACE, from_hugging_face) if library == OPEN_CLIP else (OPEN_CLIP, from_open_clip)
    if not (folder / other).exists():
        return
    try:
        theirs = flatten_dict(dataclasses.asdict(read(folder).config), sep=".")
    except ValueError:
        return  # it need not be understood
    ours = flatten_dict(dataclasses.asdict(config), sep=".")
    # The libraries have other names for a tokenizer, and one stores the width of an MLP, the other its ratio.
    same = {"text.hf_tokenizer_name"}
    for fields in (ours, theirs):
        for tower in ("vision", "text"):
            fields[f"{tower}.mlp width"] = int(fields[f"{tower}.width"] * fields.pop(f"{tower}.mlp_ratio"))
    differing = [
        f"{key} is {ours[key]!r}, and {theirs[key]!r} by {other}"
        for key in ours
        if key not in same and ours[key] != theirs[key]
    ]
    if differing:
        _log.warning("%s: %s: %s is read", folder, "; ".join(differing), library)


def from_torchscript(path: epath.Path, tensors: Mapping[str, LazyArray]) -> Metadata | None:
    """Infer the metadata of an OpenAI archive from its tensors and its program.

    Sizes follow from the shapes of the tensors, with heads of width 64; the activation follows from the program.

    Returns:
      The metadata, or None if the program does not identify the activation.

    Raises:
      ValueError: the tensors are not those of a CLIP with two transformers.
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
        raise ValueError(f"{path} is not a CLIP with two transformers: {error}") from None
    model = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": activation}
    return parse_open_clip(str(path), model, {})


def parse_open_clip(where: str, model: Any, pixels: Any) -> Metadata:
    """Return the metadata in a `model_cfg` and a `preprocess_cfg` of open_clip, which `where` names for errors.

    Raises:
      ValueError: one of them is not a JSON object, the model is not supported, or a value is wrong.
    """
    try:
        check_object("model_cfg", model)
        check_object("preprocess_cfg", pixels)
        config = CLIPConfig.from_open_clip(native_cfg(model, trained=True))
        return Metadata(config, Preprocess.from_open_clip(pixels, config.vision.image_size))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None


def _layers(tensors: Mapping[str, LazyArray], prefix: str) -> int:
    return sum(key.startswith(f"{prefix}transformer.") and key.endswith("ln_1.weight") for key in tensors)
