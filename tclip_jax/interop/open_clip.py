"""open_clip's state dict to our parameter tree and back: one table, read in both directions."""

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
from tclip_jax.ternary import TernaryTensor

Axes = tuple[int, ...] | None
State = dict[str, npt.NDArray[Any]]


class OpenClipEntry(NamedTuple):
    """One tensor of open_clip's state dict and its place in the parameter tree.

    Attributes:
      key: open_clip's name.
      path: ours, joined by slashes.
      layer: the index on our leading axis; None where layers are not stacked.
      axes: what our array is transposed by to be open_clip's; None where they are laid out alike.
      shape: open_clip's.
    """

    key: str
    path: str
    layer: int | None
    axes: Axes
    shape: tuple[int, ...]


_LINEAR = (1, 0)
_STRIP = 16  # float32 in a line of the processor's cache
_CONVOLUTION = (3, 2, 0, 1)  # height, width, in, out -> out, in, height, width

_OUTSIDE_BLOCKS: tuple[tuple[str, str, Axes], ...] = (
    ("logit_scale", "logit_scale", None),
    ("image/patch_embedding/kernel", "visual.conv1.weight", _CONVOLUTION),
    ("image/class_embedding", "visual.class_embedding", None),
    ("image/position_embedding", "visual.positional_embedding", None),
    ("image/ln_pre/scale", "visual.ln_pre.weight", None),
    ("image/ln_pre/bias", "visual.ln_pre.bias", None),
    ("image/ln_post/scale", "visual.ln_post.weight", None),
    ("image/ln_post/bias", "visual.ln_post.bias", None),
    ("image/projection/kernel", "visual.proj", None),
    ("text/token_embedding/embedding", "token_embedding.weight", None),
    ("text/position_embedding", "positional_embedding", None),
    ("text/ln_final/scale", "ln_final.weight", None),
    ("text/ln_final/bias", "ln_final.bias", None),
    ("text/projection/kernel", "text_projection", None),
)
_INSIDE_BLOCKS: tuple[tuple[str, str, Axes], ...] = (
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
_BLOCKS = (("image/blocks/", "visual.transformer.resblocks"), ("text/blocks/", "transformer.resblocks"))

# OpenAI's archives store these numbers among the weights, and PyTorch's AveragedModel the last.
_STRAYS = ("input_resolution", "context_length", "vocab_size", "n_averaged")

# Parts of names that wrappers of modules add, and what training loops call the model that they hold.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_OWNERS = ("model", "clip", "clip_model", "net", "ema", "ema_model", "model_ema", "averaged_model")


@functools.cache
def open_clip_table(config: CLIPConfig) -> tuple[OpenClipEntry, ...]:
    """The entries of every tensor of a model, those of one path together and in the order of its layers."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    entries = [
        OpenClipEntry(key, path, None, axes, _permuted(shapes[path], axes))
        for path, key, axes in _OUTSIDE_BLOCKS
        if path in shapes
    ]
    for prefix, blocks in _BLOCKS:
        for name, key, axes in _INSIDE_BLOCKS:
            layers, *shape = shapes.get(prefix + name, (0,))
            entries += [
                OpenClipEntry(f"{blocks}.{i}.{key}", prefix + name, i, axes, _permuted(tuple(shape), axes))
                for i in range(layers)
            ]
    return tuple(entries)


def to_open_clip(params: Mapping[str, Any], config: CLIPConfig) -> State:
    """The state dict that open_clip's CLIP loads strictly: contiguous float32 arrays.

    Ternary weights become scale · trit of what they store; latent weights are written as they are, without the learned
    scales that may be beside them.

    Raises:
      ValueError: parameters that are not those of `config`, naming them.
    """
    return {key: np.asarray(value) for key, value in lazy_state(params, config).items()}


def lazy_state(params: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """As `to_open_clip`, each tensor being made when it is asked for; the parameters may be lazy too."""
    leaves = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if not is_learned_scale(path)}
    shapes = flatten_dict(param_shapes(config), sep="/")
    entries = open_clip_table(config)
    check_names(leaves, {entry.path for entry in entries}, "the parameter tree")
    state = {}
    for entry in entries:
        leaf = leaves[entry.path]
        as_matrix = entry.path == PATCH_EMBEDDING and isinstance(leaf, TernaryTensor)
        shape = shapes[entry.path].shape if as_matrix else np.shape(leaf)
        _check_shape(_permuted(shape[entry.layer is not None :], entry.axes), entry)
        load = functools.partial(_write, leaf, entry, shape[entry.layer is not None :])
        state[entry.key] = LazyArray(entry.shape, np.dtype(np.float32), load)
    return state


def _write(leaf: Any, entry: OpenClipEntry, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    if entry.layer is not None:
        leaf = jax.tree.map(lambda stacked: stacked[entry.layer], leaf)
    value = np.asarray(leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf, np.float32)
    return _transposed(value.reshape(shape), entry.axes)


def from_open_clip(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, Any]:
    """The parameters, float32 NumPy arrays, of an open_clip state dict; each of its tensors is read once.

    Any float dtype, names of a wrapper (`unwrapped`), the `text.` prefix of CustomTextCLIP, a logit_scale of shape (1,)
    and the numbers that OpenAI's archives store among the weights are accepted.

    Raises:
      ValueError: missing and unexpected keys, or a tensor of another shape; all are named.
    """
    return jax.tree.map(np.asarray, lazy_params(state_dict, config))


def lazy_params(state_dict: Mapping[str, Any], config: CLIPConfig) -> dict[str, Any]:
    """As `from_open_clip`, with `LazyArray` and `LazyStack` leaves: nothing is read until a leaf is."""
    entries, state_dict = open_clip_table(config), unwrapped(state_dict, "text")
    check_names(state_dict.keys() - set(_STRAYS), {entry.key for entry in entries}, "the state dict")
    leaves: dict[str, list[LazyArray]] = {}
    for entry in entries:
        value = state_dict[entry.key]
        if entry.key != "logit_scale" or math.prod(np.shape(value)) != 1:
            _check_shape(np.shape(value), entry)
        shape = entry.shape if entry.axes is None else tuple(entry.shape[axis] for axis in np.argsort(entry.axes))
        leaves.setdefault(entry.path, []).append(
            LazyArray(shape, np.dtype(np.float32), functools.partial(_read, value, entry))
        )
    stacked = {entry.path for entry in entries if entry.layer is not None}
    return unflatten_dict(
        {path: LazyStack(tuple(values)) if path in stacked else values[0] for path, values in leaves.items()}, sep="/"
    )


def unwrapped(state_dict: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """The same tensors by their names without the parts that wrappers add, in any order and number.

    These are of DataParallel, torch.compile, FSDP and activation checkpointing anywhere, and of what a training loop
    calls its model (`model.`, `ema.` and the like) at the beginning; `more` are further ones there.

    Raises:
      ValueError: names that are the same without them.
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
    theirs = np.asarray(value).astype(np.float32, copy=False).reshape(entry.shape)
    return _transposed(theirs, None if entry.axes is None else tuple(np.argsort(entry.axes)))


def _transposed(value: npt.NDArray[np.float32], axes: Axes) -> npt.NDArray[np.float32]:
    """Contiguous; a matrix is copied in narrow strips, several times faster than NumPy does it as a whole."""
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
    """The `mlp_ratio` of which open_clip makes this hidden size, by rounding width · ratio down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check_expressible(config: CLIPConfig, what: str, *others: tuple[str, Any, Any]) -> None:
    """Raises ValueError for what open_clip's model_cfg says and `what` cannot.

    Args:
      others: further options, as (name, value, the only one that is possible).
    """
    vision, text = config.vision, config.text
    only = (
        ("vision_cfg.image_size", vision.image_size, (vision.image_size[0],) * 2),
        ("vision_cfg.pool_type", vision.pool_type, "tok"),
        ("vision_cfg.no_ln_pre", vision.no_ln_pre, False),
        ("vision_cfg.ls_init_value", vision.ls_init_value, None),
        ("text_cfg.pool_type", text.pool_type, "argmax"),
        ("text_cfg.no_causal_mask", text.no_causal_mask, False),
        ("text_cfg.ls_init_value", text.ls_init_value, None),
        *others,
    )
    for option, value, possible in only:
        if value != possible:
            raise ValueError(f"{option} is {value!r}: {what} can only have {possible!r}")
