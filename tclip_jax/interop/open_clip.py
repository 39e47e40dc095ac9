"""Convert between open_clip's state dict and our parameter tree; one table serves both directions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts.safetensors import LazyArray, LazyStack
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, is_learned_scale
from tclip_jax.schema import check_names, plain
from tclip_jax.ternary import QuantizedTensor

Axes = tuple[int, ...] | None
State = dict[str, npt.NDArray[Any]]


class OpenClipEntry(NamedTuple):
    """One tensor of open_clip's state dict and its parameter in our tree.

    Attributes:
      key: name in open_clip.
      path: path in our tree, joined by slashes.
      layer: index on our leading layer axis; None if the parameter is not stacked.
      axes: permutation of our axes that gives open_clip's layout; None if the layouts are equal.
      shape: shape in open_clip.
    """

    key: str
    path: str
    layer: int | None
    axes: Axes
    shape: tuple[int, ...]


_LINEAR = (1, 0)
_STRIP = 16  # float32 values in a cache line of the CPU
_CONVOLUTION = (3, 2, 0, 1)  # height, width, in, out -> out, in, height, width

_Names = tuple[tuple[str, str, Axes], ...]  # path, key, axes
_OUTSIDE_BLOCKS: _Names = (
    ("logit_scale", "logit_scale", None),
    ("logit_bias", "logit_bias", None),
    ("image/patch_embedding/kernel", "visual.conv1.weight", _CONVOLUTION),
    ("image/class_embedding", "visual.class_embedding", None),
    ("image/position_embedding", "visual.positional_embedding", None),
    ("image/ln_pre/scale", "visual.ln_pre.weight", None),
    ("image/ln_pre/bias", "visual.ln_pre.bias", None),
    ("image/ln_post/scale", "visual.ln_post.weight", None),
    ("image/ln_post/bias", "visual.ln_post.bias", None),
    ("image/projection/kernel", "visual.proj", None),
)
_TEXT: _Names = (
    ("text/token_embedding/embedding", "token_embedding.weight", None),
    ("text/position_embedding", "positional_embedding", None),
    ("text/ln_final/scale", "ln_final.weight", None),
    ("text/ln_final/bias", "ln_final.bias", None),
    ("text/projection/kernel", "text_projection", None),
)
# With a bias the projection is a linear layer.
_LINEAR_PROJECTION: _Names = (
    ("text/projection/kernel", "text_projection.weight", _LINEAR),
    ("text/projection/bias", "text_projection.bias", None),
)
_INSIDE_BLOCKS: _Names = (
    ("ln_1/scale", "ln_1.weight", None),
    ("ln_1/bias", "ln_1.bias", None),
    ("attention/qkv/kernel", "attn.in_proj_weight", _LINEAR),
    ("attention/qkv/bias", "attn.in_proj_bias", None),
    ("attention/out/kernel", "attn.out_proj.weight", _LINEAR),
    ("attention/out/bias", "attn.out_proj.bias", None),
    ("ls_1", "ls_1.gamma", None),
    ("ln_2/scale", "ln_2.weight", None),
    ("ln_2/bias", "ln_2.bias", None),
    ("mlp/fc1/kernel", "mlp.c_fc.weight", _LINEAR),
    ("mlp/fc1/bias", "mlp.c_fc.bias", None),
    ("mlp/fc2/kernel", "mlp.c_proj.weight", _LINEAR),
    ("mlp/fc2/bias", "mlp.c_proj.bias", None),
    ("ls_2", "ls_2.gamma", None),
)
# The image towers of SigLIP, which are timm's.
_TIMM: _Names = (
    ("logit_scale", "logit_scale", None),
    ("logit_bias", "logit_bias", None),
    ("image/patch_embedding/kernel", "visual.trunk.patch_embed.proj.weight", _CONVOLUTION),
    ("image/patch_embedding/bias", "visual.trunk.patch_embed.proj.bias", None),
    ("image/position_embedding", "visual.trunk.pos_embed", None),
    ("image/ln_post/scale", "visual.trunk.norm.weight", None),
    ("image/ln_post/bias", "visual.trunk.norm.bias", None),
    ("image/pool/attention/probe", "visual.trunk.attn_pool.latent", None),
    *(
        (f"image/pool/{path}/{ours}", f"visual.trunk.attn_pool.{key}.{theirs}", axes if ours == "kernel" else None)
        for path, key, axes in (
            ("attention/q", "q", _LINEAR),
            ("attention/kv", "kv", _LINEAR),
            ("attention/out", "proj", _LINEAR),
            ("ln", "norm", None),
            ("mlp/fc1", "mlp.fc1", _LINEAR),
            ("mlp/fc2", "mlp.fc2", _LINEAR),
        )
        for ours, theirs in (("scale" if path == "ln" else "kernel", "weight"), ("bias", "bias"))
    ),
    ("image/projection/kernel", "visual.head.proj.weight", _LINEAR),
)
_INSIDE_TIMM_BLOCKS: _Names = (
    ("ln_1/scale", "norm1.weight", None),
    ("ln_1/bias", "norm1.bias", None),
    ("attention/qkv/kernel", "attn.qkv.weight", _LINEAR),
    ("attention/qkv/bias", "attn.qkv.bias", None),
    ("attention/out/kernel", "attn.proj.weight", _LINEAR),
    ("attention/out/bias", "attn.proj.bias", None),
    ("ln_2/scale", "norm2.weight", None),
    ("ln_2/bias", "norm2.bias", None),
    ("mlp/fc1/kernel", "mlp.fc1.weight", _LINEAR),
    ("mlp/fc1/bias", "mlp.fc1.bias", None),
    ("mlp/fc2/kernel", "mlp.fc2.weight", _LINEAR),
    ("mlp/fc2/bias", "mlp.fc2.bias", None),
)
# Tensors that have a leading axis of size 1 in timm, and scalars that some files store with one.
_LED = ("visual.trunk.pos_embed", "visual.trunk.attn_pool.latent")
_SCALARS = ("logit_scale", "logit_bias")

# Numbers to ignore: OpenAI's archives store the first three with the weights, PyTorch's AveragedModel the last.
_STRAYS = ("input_resolution", "context_length", "vocab_size", "n_averaged")

# Name components that module wrappers insert, and names under which training loops hold their model.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_OWNERS = ("model", "clip", "clip_model", "net", "ema", "ema_model", "model_ema", "averaged_model")


@functools.cache
def open_clip_table(config: CLIPConfig) -> tuple[OpenClipEntry, ...]:
    """Return the entries of all tensors of a model; entries of one path are adjacent, in the order of the layers."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    timm, text = is_timm(config), "text." if is_custom_text(config) else ""
    names = _TIMM if timm else _OUTSIDE_BLOCKS
    names += tuple(
        (path, text + key, axes)
        for path, key, axes in (*_TEXT[:-1], *(_LINEAR_PROJECTION if config.text.proj_bias else _TEXT[-1:]))
    )
    entries = [
        OpenClipEntry(key, path, None, axes, (1,) * (key in _LED) + _permuted(shapes[path], axes))
        for path, key, axes in names
        if path in shapes
    ]
    image = ("visual.trunk.blocks", _INSIDE_TIMM_BLOCKS) if timm else ("visual.transformer.resblocks", _INSIDE_BLOCKS)
    towers = (("image/blocks/", *image), ("text/blocks/", f"{text}transformer.resblocks", _INSIDE_BLOCKS))
    for prefix, blocks, inside in towers:
        for name, key, axes in inside:
            layers, *shape = shapes.get(prefix + name, (0,))
            entries += [
                OpenClipEntry(f"{blocks}.{i}.{key}", prefix + name, i, axes, _permuted(tuple(shape), axes))
                for i in range(layers)
            ]
    return tuple(entries)


def is_timm(config: CLIPConfig) -> bool:
    """Whether open_clip builds the image tower by timm, as those without a class token."""
    return not config.vision.class_token


def is_custom_text(config: CLIPConfig) -> bool:
    """Whether open_clip builds a CustomTextCLIP, in which the names of the text tower start with "text."."""
    return is_timm(config) or config.text.proj_bias or config.text.proj_type == "none"


def to_open_clip(params: Mapping[str, Any], config: CLIPConfig) -> State:
    """Return a state dict that open_clip's CLIP loads strictly: contiguous float32 arrays.

    Ternary weights become scale · trit. Latent weights are written unchanged, and learned scales are omitted.

    Raises:
      ValueError: the parameters do not match `config`; the message names them.
    """
    return {key: np.asarray(value) for key, value in lazy_state(params, config).items()}


def lazy_state(params: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Return the state dict of `to_open_clip` with lazy tensors; the parameters may be lazy too."""
    leaves = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if not is_learned_scale(path)}
    shapes = flatten_dict(param_shapes(config), sep="/")
    entries = open_clip_table(config)
    check_names(leaves, {entry.path for entry in entries}, "the parameter tree")
    state = {}
    for entry in entries:
        leaf = leaves[entry.path]
        as_matrix = entry.path == PATCH_EMBEDDING and isinstance(leaf, QuantizedTensor)
        shape = shapes[entry.path].shape if as_matrix else np.shape(leaf)
        _check_shape((1,) * (entry.key in _LED) + _permuted(shape[entry.layer is not None :], entry.axes), entry)
        load = functools.partial(_write, leaf, entry, shape[entry.layer is not None :])
        state[entry.key] = LazyArray(entry.shape, np.dtype(np.float32), load)
    return state


def _write(leaf: Any, entry: OpenClipEntry, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return _transposed(dense_layer(leaf, entry.layer, shape), entry.axes).reshape(entry.shape)


def dense_layer(leaf: Any, layer: int | None, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a parameter as floats of this shape, or one layer of it; a ternary one becomes scale · trit."""
    if layer is not None:
        leaf = jax.tree.map(lambda stacked: stacked[layer], leaf)
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf, np.float32).reshape(shape)


def from_open_clip(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, Any]:
    """Return the parameter tree, float32 NumPy arrays, of an open_clip state dict; each tensor is read once.

    Accept any float dtype, names with the prefixes of wrappers (`unwrapped`), the `text.` prefix of CustomTextCLIP, a
    logit_scale and a logit_bias of shape (1,), and the extra numbers in OpenAI's archives.

    Raises:
      ValueError: keys are missing or unexpected, or a tensor has another shape; the message names them.
    """
    return jax.tree.map(np.asarray, lazy_params(state_dict, config))


def lazy_params(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, Any]:
    """Return the parameter tree of `from_open_clip` with `LazyArray` and `LazyStack` leaves."""
    entries = [entry._replace(key=entry.key.removeprefix("text.")) for entry in open_clip_table(config)]
    state_dict = unwrapped(state_dict, "text")
    check_names(state_dict.keys() - set(_STRAYS), {entry.key for entry in entries}, "the state dict")
    leaves: dict[str, list[LazyArray]] = {}
    for entry in entries:
        value = state_dict[entry.key]
        if entry.key not in _SCALARS or math.prod(np.shape(value)) != 1:
            _check_shape(np.shape(value), entry)
        shape = entry.shape[entry.key in _LED :]
        shape = shape if entry.axes is None else tuple(shape[axis] for axis in np.argsort(entry.axes))
        leaves.setdefault(entry.path, []).append(
            LazyArray(shape, np.dtype(np.float32), functools.partial(_read, value, entry))
        )
    stacked = {entry.path for entry in entries if entry.layer is not None}
    return unflatten_dict(
        {path: LazyStack(tuple(values)) if path in stacked else values[0] for path, values in leaves.items()}, sep="/"
    )


def unwrapped(state_dict: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return the tensors by their names without the components that wrappers add.

    Components of DataParallel, torch.compile, FSDP and activation checkpointing are removed anywhere in a name. Names
    that training loops give their model (`model.`, `ema.`, ...) are removed at the start.

    Args:
      state_dict: tensors by name.
      *more: further names to remove at the start.

    Raises:
      ValueError: two names become equal.
    """
    keys: dict[str, str] = {}
    for key in state_dict:
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        while len(parts) > 1 and parts[0] in (*_OWNERS, *more):
            del parts[0]
        name = ".".join(parts)
        if name in keys:
            raise ValueError(f"the state dict holds {plain(name)} twice, as {plain(keys[name])} and {plain(key)}")
        keys[name] = key
    return {name: state_dict[key] for name, key in keys.items()}


def _read(value: Any, entry: OpenClipEntry) -> npt.NDArray[np.float32]:
    tensor = np.asarray(value).astype(np.float32, copy=False).reshape(entry.shape[entry.key in _LED :])
    return _transposed(tensor, None if entry.axes is None else tuple(np.argsort(entry.axes)))


def _transposed(value: npt.NDArray[np.float32], axes: Axes) -> npt.NDArray[np.float32]:
    """Return a contiguous transpose; a matrix is copied in narrow strips, several times faster than by NumPy."""
    if axes != _LINEAR:
        return np.asarray(value if axes is None else value.transpose(axes), order="C")
    copy = np.empty(value.shape[::-1], value.dtype)
    for start in range(0, len(value), _STRIP):
        copy[:, start : start + _STRIP] = value[start : start + _STRIP].T
    return copy


def _check_shape(shape: tuple[int, ...], entry: OpenClipEntry) -> None:
    if shape != entry.shape:
        raise ValueError(f"{entry.key} has shape {shape}: the model's is {entry.shape}")


def _permuted(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    return shape if axes is None else tuple(shape[axis] for axis in axes)


def mlp_ratio(width: int, hidden: int) -> float:
    """Return the `mlp_ratio` for which open_clip computes this hidden size, as int(width · ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check_expressible(config: CLIPConfig, what: str, *others: tuple[str, Any, Any]) -> None:
    """Raise ValueError for the first option that another library or format cannot express.

    Args:
      config: the model.
      what: name of the library or format, for the message.
      *others: further options to check, as (name, value, only possible value).
    """
    vision, text = config.vision, config.text
    check_options(
        what,
        ("vision_cfg.image_size", vision.image_size, (vision.image_size[0],) * 2),
        ("vision_cfg.pool_type", vision.pool_type, "tok"),
        ("vision_cfg.no_ln_pre", vision.no_ln_pre, False),
        ("vision_cfg.class_token", vision.class_token, True),
        ("vision_cfg.patch_bias", vision.patch_bias, False),
        ("vision_cfg.projection", vision.projection, True),
        ("vision_cfg.ls_init_value", vision.ls_init_value, None),
        ("text_cfg.pool_type", text.pool_type, "argmax"),
        ("text_cfg.no_causal_mask", text.no_causal_mask, False),
        ("text_cfg.ls_init_value", text.ls_init_value, None),
        ("text_cfg.proj_bias", text.proj_bias, False),
        ("text_cfg.proj_type", text.proj_type, "linear"),
        ("init_logit_bias", config.init_logit_bias, None),
        *others,
    )


def check_options(what: str, *only: tuple[str, Any, Any]) -> None:
    """Raise ValueError for the first option, as (name, value, only possible value), that `what` cannot express."""
    for option, value, possible in only:
        if value != possible:
            raise ValueError(f"{option} is {value!r}: {what} can only have {possible!r}")
