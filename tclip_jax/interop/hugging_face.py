"""Convert state dicts between open_clip and transformers' CLIPModel, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.interop.open_clip import check_expressible, unwrapped
from tclip_jax.models.config import CLIPConfig
from tclip_jax.schema import check_names


class HuggingFaceEntry(NamedTuple):
    """One tensor of CLIPModel and its counterpart in open_clip.

    Attributes:
      key: name in CLIPModel.
      open_clip: name of the tensor in open_clip that contains it.
      third: index of the third (0 q, 1 k, 2 v) of that tensor; None for the whole tensor.
      transposed: whether CLIPModel stores the transpose.
    """

    key: str
    open_clip: str
    third: int | None = None
    transposed: bool = False


_OUTSIDE_BLOCKS = (
    HuggingFaceEntry("logit_scale", "logit_scale"),
    HuggingFaceEntry("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    HuggingFaceEntry("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    HuggingFaceEntry("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    HuggingFaceEntry("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),
    HuggingFaceEntry("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
    HuggingFaceEntry("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
    HuggingFaceEntry("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
    HuggingFaceEntry("visual_projection.weight", "visual.proj", transposed=True),
    HuggingFaceEntry("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    HuggingFaceEntry("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    HuggingFaceEntry("text_model.final_layer_norm.weight", "ln_final.weight"),
    HuggingFaceEntry("text_model.final_layer_norm.bias", "ln_final.bias"),
    HuggingFaceEntry("text_projection.weight", "text_projection", transposed=True),
)
_INSIDE_BLOCKS = (
    HuggingFaceEntry("layer_norm1.weight", "ln_1.weight"),
    HuggingFaceEntry("layer_norm1.bias", "ln_1.bias"),
    HuggingFaceEntry("self_attn.q_proj.weight", "attn.in_proj_weight", 0),
    HuggingFaceEntry("self_attn.k_proj.weight", "attn.in_proj_weight", 1),
    HuggingFaceEntry("self_attn.v_proj.weight", "attn.in_proj_weight", 2),
    HuggingFaceEntry("self_attn.q_proj.bias", "attn.in_proj_bias", 0),
    HuggingFaceEntry("self_attn.k_proj.bias", "attn.in_proj_bias", 1),
    HuggingFaceEntry("self_attn.v_proj.bias", "attn.in_proj_bias", 2),
    HuggingFaceEntry("self_attn.out_proj.weight", "attn.out_proj.weight"),
    HuggingFaceEntry("self_attn.out_proj.bias", "attn.out_proj.bias"),
    HuggingFaceEntry("layer_norm2.weight", "ln_2.weight"),
    HuggingFaceEntry("layer_norm2.bias", "ln_2.bias"),
    HuggingFaceEntry("mlp.fc1.weight", "mlp.c_fc.weight"),
    HuggingFaceEntry("mlp.fc1.bias", "mlp.c_fc.bias"),
    HuggingFaceEntry("mlp.fc2.weight", "mlp.c_proj.weight"),
    HuggingFaceEntry("mlp.fc2.bias", "mlp.c_proj.bias"),
)

# Buffers to ignore: older versions of transformers save the first two, PyTorch's AveragedModel the last.
_STRAYS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "n_averaged")


def hugging_face_table(config: CLIPConfig) -> list[HuggingFaceEntry]:
    """Return the entries of all tensors of a model; the thirds of a tensor are in the order q, k, v.

    Raises:
      ValueError: CLIPModel cannot express the model; the message names the option.
    """
    check_expressible(config, "transformers' CLIPModel")
    towers = (("vision_model", "visual.", config.vision.layers), ("text_model", "", config.text.layers))
    return list(_OUTSIDE_BLOCKS) + [
        entry._replace(
            key=f"{tower}.encoder.layers.{i}.{entry.key}",
            open_clip=f"{prefix}transformer.resblocks.{i}.{entry.open_clip}",
        )
        for tower, prefix, layers in towers
        for i in range(layers)
        for entry in _INSIDE_BLOCKS
    ]


def to_hugging_face(open_clip_state: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Convert open_clip's state dict to that of transformers' CLIPModel, lazily, with unchanged dtypes.

    Raises:
      ValueError: CLIPModel cannot express the model, or keys are missing or unexpected; the message names them.
    """
    entries = hugging_face_table(config)
    check_names(open_clip_state, {entry.open_clip for entry in entries}, "open_clip's state dict")
    return {entry.key: _part(open_clip_state[entry.open_clip], entry) for entry in entries}


def _part(tensor: Any, entry: HuggingFaceEntry) -> LazyArray:
    """Return the tensor of CLIPModel as a lazy third of open_clip's, or the whole."""
    shape = np.shape(tensor)
    if entry.third is not None:
        shape = (shape[0] // 3, *shape[1:])

    def load() -> npt.NDArray[Any]:
        value = np.asarray(tensor)
        value = value if entry.third is None else np.split(value, 3)[entry.third]
        return np.ascontiguousarray(value.T) if entry.transposed else value

    return LazyArray(shape[::-1] if entry.transposed else shape, tensor.dtype, load)


def from_hugging_face(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Convert the state dict of transformers' CLIPModel to open_clip's, lazily; the inverse of `to_hugging_face`.

    Names may have the prefixes of wrappers; see `unwrapped`.

    Raises:
      ValueError: CLIPModel cannot express the model, keys are missing or unexpected, or the thirds of a tensor have
        different shapes; the message names them.
    """
    entries, state_dict = hugging_face_table(config), unwrapped(state_dict)
    check_names(state_dict.keys() - set(_STRAYS), {entry.key for entry in entries}, "CLIPModel's state dict")
    parts: dict[str, list[Any]] = {}
    for entry in entries:
        parts.setdefault(entry.open_clip, []).append(state_dict[entry.key])
    for key, values in parts.items():
        shapes = [np.shape(value) for value in values]
        if len(shapes) > 1 and (len(set(shapes)) > 1 or () in shapes):
            raise ValueError(f"the thirds of {key} have shapes {', '.join(map(str, shapes))}: they must be equal")
    transposed = {entry.open_clip for entry in entries if entry.transposed}
    return {key: _joined(values, key in transposed) for key, values in parts.items()}


def _joined(parts: list[Any], transposed: bool) -> LazyArray:
    """Return the lazy concatenation of thirds, or the whole tensor."""
    shape = np.shape(parts[0])
    if len(parts) > 1:
        shape = (len(parts) * shape[0], *shape[1:])

    def load() -> npt.NDArray[Any]:
        value = np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])
        return np.ascontiguousarray(value.T) if transposed else value

    return LazyArray(shape[::-1] if transposed else shape, parts[0].dtype, load)
