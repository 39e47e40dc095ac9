"""Convert state dicts between open_clip and transformers' CLIPModel or SiglipModel, in both directions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.interop.open_clip import check_expressible, check_options, is_timm, unwrapped
from tclip_jax.models.config import CLIPConfig
from tclip_jax.schema import check_names


class HuggingFaceEntry(NamedTuple):
    """One tensor of transformers' model and its counterpart in open_clip.

    Attributes:
      key: name in transformers.
      open_clip: name of the tensor in open_clip that contains it.
      third: index of the third (0 q, 1 k, 2 v) of that tensor; None for the whole tensor.
      transposed: whether transformers stores the transpose.
      axes: number of leading axes of size 1 that open_clip's tensor has and transformers' has not; −1 the other way.
    """

    key: str
    open_clip: str
    third: int | None = None
    transposed: bool = False
    axes: int = 0


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

# SiglipModel. Its names in the blocks are CLIPModel's; those of the image tower in open_clip are timm's.
_SIGLIP_OUTSIDE_BLOCKS = (
    HuggingFaceEntry("logit_scale", "logit_scale", axes=-1),
    HuggingFaceEntry("logit_bias", "logit_bias", axes=-1),
    HuggingFaceEntry("vision_model.embeddings.patch_embedding.weight", "visual.trunk.patch_embed.proj.weight"),
    HuggingFaceEntry("vision_model.embeddings.patch_embedding.bias", "visual.trunk.patch_embed.proj.bias"),
    HuggingFaceEntry("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed", axes=1),
    HuggingFaceEntry("vision_model.head.probe", "visual.trunk.attn_pool.latent"),
    *(
        HuggingFaceEntry(f"{key}.{part}", f"{open_clip}.{part}")
        for key, open_clip in (
            ("vision_model.post_layernorm", "visual.trunk.norm"),
            ("vision_model.head.attention.q", "visual.trunk.attn_pool.q"),  # `_split_head`
            ("vision_model.head.attention.kv", "visual.trunk.attn_pool.kv"),
            ("vision_model.head.attention.out_proj", "visual.trunk.attn_pool.proj"),
            ("vision_model.head.layernorm", "visual.trunk.attn_pool.norm"),
            ("vision_model.head.mlp.fc1", "visual.trunk.attn_pool.mlp.fc1"),
            ("vision_model.head.mlp.fc2", "visual.trunk.attn_pool.mlp.fc2"),
            ("text_model.final_layer_norm", "text.ln_final"),
            ("text_model.head", "text.text_projection"),
        )
        for part in ("weight", "bias")
    ),
    HuggingFaceEntry("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight"),
    HuggingFaceEntry("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
)
_TIMM_NAMES = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_", "attn.qkv."),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_HEAD = "vision_model.head.attention."

# Buffers to ignore: older versions of transformers save the first two, PyTorch's AveragedModel the last.
_STRAYS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "n_averaged")


def hugging_face_table(config: CLIPConfig) -> list[HuggingFaceEntry]:
    """Return the entries of all tensors of a model; the thirds of a tensor are in the order q, k, v.

    Raises:
      ValueError: neither CLIPModel nor SiglipModel can express the model; the message names the option.
    """
    check_hugging_face(config)
    siglip = is_timm(config)
    image, text = (
        ("visual.trunk.blocks", "text.transformer.resblocks")
        if siglip
        else (
            "visual.transformer.resblocks",
            "transformer.resblocks",
        )
    )
    towers = (("vision_model", image, config.vision.layers), ("text_model", text, config.text.layers))
    return list(_SIGLIP_OUTSIDE_BLOCKS if siglip else _OUTSIDE_BLOCKS) + [
        entry._replace(
            key=f"{tower}.encoder.layers.{i}.{entry.key}",
            open_clip=f"{blocks}.{i}.{_timm_name(entry.open_clip) if '.trunk.' in blocks else entry.open_clip}",
        )
        for tower, blocks, layers in towers
        for i in range(layers)
        for entry in _INSIDE_BLOCKS
    ]


def check_hugging_face(config: CLIPConfig) -> None:
    """Raise ValueError, naming the option, if neither CLIPModel nor SiglipModel can express the model."""
    vision, text = config.vision, config.text
    if not is_timm(config):
        check_expressible(config, "transformers' CLIPModel")
        return
    check_options(
        "transformers' SiglipModel",
        ("vision_cfg.image_size", vision.image_size, (vision.image_size[0],) * 2),
        ("vision_cfg.pool_type", vision.pool_type, "map"),
        ("vision_cfg.no_ln_pre", vision.no_ln_pre, True),
        ("vision_cfg.patch_bias", vision.patch_bias, True),
        ("vision_cfg.projection", vision.projection, False),
        ("vision_cfg.ls_init_value", vision.ls_init_value, None),
        ("text_cfg.pool_type", text.pool_type, "last"),
        ("text_cfg.no_causal_mask", text.no_causal_mask, True),
        ("text_cfg.proj_bias", text.proj_bias, True),
        ("text_cfg.ls_init_value", text.ls_init_value, None),
        ("whether it has a logit bias", config.init_logit_bias is not None, True),
    )


def _timm_name(name: str) -> str:
    for ours, timm in _TIMM_NAMES:
        name = name.replace(ours, timm)
    return name


def to_hugging_face(open_clip_state: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Convert open_clip's state dict to that of transformers' model, lazily, with unchanged dtypes.

    Raises:
      ValueError: transformers cannot express the model, or keys are missing or unexpected; the message names them.
    """
    entries = hugging_face_table(config)
    check_names(open_clip_state, {entry.open_clip for entry in entries}, "open_clip's state dict")
    state = {entry.key: _part(open_clip_state[entry.open_clip], entry) for entry in entries}
    for part in ("weight", "bias") if is_timm(config) else ():
        thirds = [state.pop(f"{_HEAD}{name}.{part}") for name in ("q", "kv")]
        state[f"{_HEAD}in_proj_{part}"] = _concatenated(thirds)
    return state


def _part(tensor: Any, entry: HuggingFaceEntry) -> LazyArray:
    """Return the tensor of transformers as a lazy third of open_clip's, or the whole."""
    shape = np.shape(tensor)
    if entry.third is not None:
        shape = (shape[0] // 3, *shape[1:])
    shape = _with_axes(shape[::-1] if entry.transposed else shape, -entry.axes)

    def load() -> npt.NDArray[Any]:
        value = np.asarray(tensor)
        value = value if entry.third is None else np.split(value, 3)[entry.third]
        return np.ascontiguousarray(value.T if entry.transposed else value).reshape(shape)

    return LazyArray(shape, tensor.dtype, load)


def from_hugging_face(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Convert the state dict of transformers' model to open_clip's, lazily; the inverse of `to_hugging_face`.

    Names may have the prefixes of wrappers; see `unwrapped`.

    Raises:
      ValueError: transformers cannot express the model, keys are missing or unexpected, or the thirds of a tensor have
        different shapes; the message names them.
    """
    entries, state_dict = hugging_face_table(config), unwrapped(state_dict)
    model, expected = "CLIPModel", {entry.key for entry in entries}
    if is_timm(config):
        model, state_dict = "SiglipModel", _split_head(state_dict)
    check_names(state_dict.keys() - set(_STRAYS), expected, f"{model}'s state dict")
    parts: dict[str, list[Any]] = {}
    for entry in entries:
        parts.setdefault(entry.open_clip, []).append(state_dict[entry.key])
    for key, values in parts.items():
        shapes = [np.shape(value) for value in values]
        if len(shapes) > 1 and (len(set(shapes)) > 1 or () in shapes):
            raise ValueError(f"the thirds of {key} have shapes {', '.join(map(str, shapes))}: they must be equal")
    by_name = {entry.open_clip: entry for entry in entries}
    return {key: _joined(values, by_name[key]) for key, values in parts.items()}


def _joined(parts: list[Any], entry: HuggingFaceEntry) -> LazyArray:
    """Return the lazy concatenation of thirds, or the whole tensor, as open_clip stores it."""
    whole = _concatenated(parts) if len(parts) > 1 else parts[0]
    shape = np.shape(whole)
    if entry.axes < 0 and shape[:1] != (1,):
        return whole  # of another shape, which is refused with the others
    shape = _with_axes(shape[::-1] if entry.transposed else shape, entry.axes)

    def load() -> npt.NDArray[Any]:
        value = np.asarray(whole)
        return np.ascontiguousarray(value.T if entry.transposed else value).reshape(shape)

    return LazyArray(shape, whole.dtype, load)


def _split_head(state: Mapping[str, Any]) -> dict[str, Any]:
    """Split the stacked q, k and v of the attention pooling into q and kv, as timm has them."""
    split = dict(state)
    for part in ("weight", "bias"):
        tensor = split.pop(f"{_HEAD}in_proj_{part}", None)
        if tensor is None or not np.shape(tensor):
            continue
        rows = np.shape(tensor)[0] // 3
        for name, start, stop in (("q", 0, rows), ("kv", rows, np.shape(tensor)[0])):
            shape = (stop - start, *np.shape(tensor)[1:])
            load = functools.partial(lambda whole, rows: np.asarray(whole)[rows], tensor, slice(start, stop))
            split[f"{_HEAD}{name}.{part}"] = LazyArray(shape, tensor.dtype, load)
    return split


def _concatenated(parts: list[Any]) -> LazyArray:
    shape = (sum(np.shape(part)[0] for part in parts), *np.shape(parts[0])[1:])
    return LazyArray(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts]))


def _with_axes(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (1,) * count + shape if count >= 0 else shape[-count:]
