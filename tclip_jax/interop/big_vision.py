"""Convert between big_vision's two-tower checkpoints and our parameter tree; one table serves both directions.

A checkpoint is an .npz of arrays without metadata. Names and layouts are those of big_vision's models/vit.py,
models/proj/image_text/text_transformer.py and two_towers.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from tclip_jax.artifacts.safetensors import LazyArray, LazyStack
from tclip_jax.interop.big_vision_config import ATTENTION, POSITIONS, check_big_vision
from tclip_jax.interop.npz import NpzArray, read_npz, write_npz
from tclip_jax.interop.open_clip import dense_layer
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import is_learned_scale
from tclip_jax.schema import check_names, plain

_PREFIXES = ("params/", "opt/target/", "")  # of the weights, in checkpoints with and without an optimizer's state
_HEAD_BIAS = "img/head/bias"
_MAX_LAYERS = 1000


class BigVisionEntry(NamedTuple):
    """A parameter of our tree, or a layer of it, and its arrays in big_vision.

    Attributes:
      path: path in our tree, joined by slashes.
      layer: index on our leading layer axis; None if the parameter is not stacked.
      keys: names in big_vision without `params/`; several are concatenated on our last axis.
      shape: shape of each of the arrays in big_vision.
    """

    path: str
    layer: int | None
    keys: tuple[str, ...]
    shape: tuple[int, ...]


_OUTSIDE_BLOCKS = (
    ("logit_scale", "t"),
    ("logit_bias", "b"),
    ("image/patch_embedding/kernel", "img/embedding/kernel"),
    ("image/patch_embedding/bias", "img/embedding/bias"),
    ("image/class_embedding", "img/cls"),
    ("image/position_embedding", POSITIONS),
    ("image/ln_post/scale", "img/Transformer/encoder_norm/scale"),
    ("image/ln_post/bias", "img/Transformer/encoder_norm/bias"),
    ("image/projection/kernel", "img/head/kernel"),
    ("image/pool/attention/probe", "img/MAPHead_0/probe"),
    ("image/pool/ln/scale", "img/MAPHead_0/LayerNorm_0/scale"),
    ("image/pool/ln/bias", "img/MAPHead_0/LayerNorm_0/bias"),
    ("text/token_embedding/embedding", "txt/Embed_0/embedding"),
    ("text/position_embedding", "txt/pos_embedding"),
    ("text/ln_final/scale", "txt/Encoder_0/encoder_norm/scale"),
    ("text/ln_final/bias", "txt/Encoder_0/encoder_norm/bias"),
    ("text/projection/kernel", "txt/head/kernel"),
    ("text/projection/bias", "txt/head/bias"),
)
# Below a block, or below the attention pooling.
_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention/qkv", tuple(f"{ATTENTION}/{name}" for name in ("query", "key", "value"))),
    ("attention/q", (f"{ATTENTION}/query",)),
    ("attention/kv", (f"{ATTENTION}/key", f"{ATTENTION}/value")),
    ("attention/out", (f"{ATTENTION}/out",)),
    ("mlp/fc1", ("MlpBlock_0/Dense_0",)),
    ("mlp/fc2", ("MlpBlock_0/Dense_1",)),
)
_NORMS = (("ln_1", "LayerNorm_0"), ("ln_2", "LayerNorm_1"))


@functools.cache
def big_vision_table(config: CLIPConfig) -> tuple[BigVisionEntry, ...]:
    """Return the entries of all parameters of a model; entries of one path are adjacent, in the order of the layers.

    Raises:
      ValueError: big_vision's models cannot express the model; the message names the option.
    """
    check_big_vision(config)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    inside: list[tuple[str, tuple[str, ...]]] = [
        (f"{ours}/{part}", (f"{key}/{part}",)) for ours, key in _NORMS for part in ("scale", "bias")
    ]
    inside += [
        (f"{ours}/{part}", tuple(f"{key}/{part}" for key in keys))
        for ours, keys in _PARTS
        for part in ("kernel", "bias")
    ]
    entries = [
        BigVisionEntry(path, None, (key,), _outside_shape(key, shapes[path], config.vision))
        for path, key in _OUTSIDE_BLOCKS
        if path in shapes
    ]
    pool = [(f"image/pool/{path}", tuple(f"img/MAPHead_0/{key}" for key in keys)) for path, keys in inside]
    entries += [
        BigVisionEntry(path, None, keys, _inside_shape(path, shapes[path], len(keys), config.vision))
        for path, keys in pool
        if path in shapes
    ]
    for tower, blocks, cfg in (
        ("image", "img/Transformer", config.vision),
        ("text", "txt/Encoder_0", config.text),
    ):
        for name, keys in inside:
            path = f"{tower}/blocks/{name}"
            layers, *shape = shapes.get(path, (0,))
            entries += [
                BigVisionEntry(
                    path,
                    i,
                    tuple(f"{blocks}/encoderblock_{i}/{key}" for key in keys),
                    _inside_shape(path, tuple(shape), len(keys), cfg),
                )
                for i in range(layers)
            ]
    return tuple(entries)


def _outside_shape(key: str, shape: tuple[int, ...], vision: VisionConfig) -> tuple[int, ...]:
    if key == POSITIONS and vision.class_token:  # big_vision adds positions before it prepends the token
        shape = (shape[0] - 1, *shape[1:])
    led = {"t": 1, "b": 1, "img/cls": 2, "img/MAPHead_0/probe": 1, POSITIONS: 1, "txt/pos_embedding": 1}
    return (1,) * led.get(key, 0) + shape


def _inside_shape(path: str, shape: tuple[int, ...], parts: int, cfg: VisionConfig | TextConfig) -> tuple[int, ...]:
    """Return the shape of each of the arrays of a parameter in a block: heads have an axis of their own."""
    shape = (*shape[:-1], shape[-1] // parts)
    heads = (cfg.heads, cfg.width // cfg.heads)
    if "/attention/" not in path or path.endswith("out/bias"):
        return shape
    return (*heads, *shape[1:]) if path.endswith("out/kernel") else (*shape[:-1], *heads)


def open_big_vision(path: epath.Path) -> dict[str, LazyArray]:
    """Return the arrays of a checkpoint by their names below `params/`, those of scanned blocks a layer at a time.

    Raises:
      ValueError: the file is damaged or holds no two-tower model of big_vision.
    """
    arrays = read_npz(path)
    prefix = next((each for each in _PREFIXES if any(name.startswith(f"{each}img/") for name in arrays)), None)
    if prefix is None or not any(name.startswith(f"{prefix}txt/") for name in arrays):
        first = ", ".join(plain(name) for name in sorted(arrays)[:3]) or "nothing"
        raise ValueError(f"{path} has no params/img and params/txt, the towers of big_vision; it holds {first}, …")
    tensors: dict[str, LazyArray] = {}
    for name, array in arrays.items():
        if not name.startswith(prefix):
            continue
        if not all(array.shape):
            raise ValueError(f"{path}: {plain(name)} has shape {array.shape}: an axis is empty")
        if "/encoderblock/" in name and array.shape and array.shape[0] > _MAX_LAYERS:
            raise ValueError(f"{path}: {plain(name)} has {array.shape[0]} layers: at most {_MAX_LAYERS} are read")
        for each, tensor in _unscanned(name.removeprefix(prefix), array).items():
            if tensors.setdefault(each, tensor) is not tensor:
                raise ValueError(f"{path}: {plain(each)} is there twice, in a scanned array and alone")
    if _HEAD_BIAS in tensors and not np.any(np.asarray(tensors[_HEAD_BIAS])):
        del tensors[_HEAD_BIAS]  # as `to_big_vision` writes it
    return tensors


def _unscanned(name: str, array: NpzArray) -> dict[str, LazyArray]:
    """Return the layers of an array of scanned blocks by their names in unscanned ones; any other array as it is."""
    before, found, after = name.partition("/encoderblock/")
    if not found or not array.shape:
        return {name: array}
    return {f"{before}/encoderblock_{i}/{after}": layer for i, layer in enumerate(array.layers().layers)}


def from_big_vision(tensors: Mapping[str, LazyArray], config: CLIPConfig) -> dict[str, Any]:
    """Return the parameter tree, with lazy float32 leaves, of the arrays of `open_big_vision`.

    Raises:
      ValueError: arrays are missing or unexpected, or one has another shape; the message names them.
    """
    if _HEAD_BIAS in tensors:
        raise ValueError(f"it has {_HEAD_BIAS}, and it is not 0: the projection of images has no bias here")
    entries = big_vision_table(config)
    check_names(tensors, {key for entry in entries for key in entry.keys}, "the checkpoint of big_vision")
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    leaves: dict[str, list[LazyArray]] = {}
    for entry in entries:
        for key in entry.keys:
            if tensors[key].shape != entry.shape:
                raise ValueError(f"{key} has shape {tensors[key].shape}: the model's is {entry.shape}")
        shape = shapes[entry.path][entry.layer is not None :]
        load = functools.partial(_read, tuple(tensors[key] for key in entry.keys), shape)
        leaves.setdefault(entry.path, []).append(LazyArray(shape, np.dtype(np.float32), load))
    stacked = {entry.path for entry in entries if entry.layer is not None}
    return unflatten_dict(
        {path: LazyStack(tuple(values)) if path in stacked else values[0] for path, values in leaves.items()}, sep="/"
    )


def _read(arrays: tuple[LazyArray, ...], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    parts = [np.asarray(array).astype(np.float32, copy=False) for array in arrays]
    if len(parts) > 1:
        return np.concatenate([part.reshape(*shape[:-1], -1) for part in parts], axis=-1)
    (part,) = parts
    if part.size < math.prod(shape):  # positions without that of the class token, to which nothing is added
        part = np.concatenate([np.zeros((1, shape[-1]), np.float32), part.reshape(-1, shape[-1])])
    return part.reshape(shape)


def to_big_vision(params: Mapping[str, Any], config: CLIPConfig) -> dict[str, LazyArray]:
    """Return the arrays of a checkpoint by name, lazily: float32, blocks not scanned.

    Ternary weights become scale · trit. Latent weights are written unchanged, and learned scales are omitted. The
    position of a class token is added to it, as the model does. An image head has a bias in big_vision: zeros.

    Raises:
      ValueError: big_vision cannot express the model, or the parameters do not match it; the message names them.
    """
    entries = big_vision_table(config)
    leaves = {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if not is_learned_scale(path)}
    check_names(leaves, {entry.path for entry in entries}, "the parameter tree")
    shapes = {path: leaf.shape for path, leaf in flatten_dict(param_shapes(config), sep="/").items()}
    float32 = np.dtype(np.float32)
    arrays: dict[str, LazyArray] = {}
    for entry in entries:
        shape = shapes[entry.path][entry.layer is not None :]
        for i, key in enumerate(entry.keys):
            load = functools.partial(_write, leaves[entry.path], entry, shape, i)
            arrays[f"params/{key}"] = LazyArray(entry.shape, float32, load)
    if config.vision.class_token:
        token, positions = leaves["image/class_embedding"], leaves["image/position_embedding"]
        arrays["params/img/cls"] = LazyArray(
            (1, 1, config.vision.width),
            float32,
            lambda: (np.asarray(token, np.float32) + np.asarray(positions, np.float32)[0])[None, None],
        )
    if config.vision.projection:
        width = config.embed_dim
        arrays[f"params/{_HEAD_BIAS}"] = LazyArray((width,), float32, lambda: np.zeros(width, np.float32))
    return arrays


def _write(leaf: Any, entry: BigVisionEntry, shape: tuple[int, ...], part: int) -> npt.NDArray[np.float32]:
    value = dense_layer(leaf, entry.layer, shape)
    if entry.keys == (POSITIONS,):
        value = value[-entry.shape[1] :]
    return np.ascontiguousarray(np.split(value, len(entry.keys), axis=-1)[part] if value.ndim else value).reshape(
        entry.shape
    )


def write_big_vision(path: epath.PathLike, arrays: Mapping[str, LazyArray]) -> None:
    """Write the arrays of `to_big_vision` to an .npz, and compare the file with them bit for bit.

    Raises:
      ValueError: the file has other bits, as after a failed write.
    """
    write_npz(path, arrays)
    written = read_npz(path)
    for name, array in arrays.items():
        if np.asarray(written[name]).tobytes() != np.asarray(array).tobytes():
            raise ValueError(f"{path}: {name} was not written correctly")
