"""Convert a CLIP's configuration to the metadata of a GGUF file and back, and name its tensors as clip.cpp does."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tclip_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from tclip_jax.data.tokenizer import VOCAB_SIZE, vocabulary_files
from tclip_jax.interop.gguf_file import ARCHITECTURE_KEY, Kind
from tclip_jax.interop.open_clip import check_expressible, mlp_ratio
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING

ARCHITECTURE = "clip"
# llama.cpp's file types, "mostly TQ1_0" and "mostly TQ2_0", and its version of the quantized types.
_FILE_TYPES: dict[Kind, int] = {"tq1_0": 36, "tq2_0": 37}
_QUANTIZATION_VERSION = 2
_EPSILON = 1e-5
# Limits far above any model, yet so low that products cannot overflow.
_LARGEST, _MOST_LAYERS = 2**15, 2**10

_OUTSIDE_BLOCKS = {
    "image/patch_embedding": "v.patch_embd",
    "image/position_embedding": "v.position_embd.weight",
    "image/class_embedding": "v.class_embd",
    "image/ln_pre": "v.pre_ln",
    "image/ln_post": "v.post_ln",
    "image/projection": "visual_projection",
    "text/token_embedding": "t.token_embd",
    "text/position_embedding": "t.position_embd.weight",
    "text/ln_final": "t.post_ln",
    "text/projection": "text_projection",
}
# clip.cpp exchanges the names: ffn_down is fc1, which widens, and ffn_up is fc2, which narrows.
_INSIDE_BLOCKS = {
    "ln_1": ("ln1",),
    "attention/qkv": ("attn_q", "attn_k", "attn_v"),
    "attention/out": ("attn_out",),
    "ln_2": ("ln2",),
    "mlp/fc1": ("ffn_down",),
    "mlp/fc2": ("ffn_up",),
}
_TOWERS = {"image": "v", "text": "t"}
_SUFFIXES = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class GgufEntry(NamedTuple):
    """One tensor of the file and its parameter in our tree.

    Attributes:
      name: name in the file.
      path: path in our tree, joined by slashes.
      layer: index on our leading layer axis; None if the parameter is not stacked.
      part: index among `parts` equal parts along the outputs, such as q, k and v of qkv.
      parts: number of parts.
    """

    name: str
    path: str
    layer: int | None = None
    part: int = 0
    parts: int = 1

    def view(self, stacked: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return this tensor as a view of `stacked` (the array at `path`, or its scales), with the outputs first."""
        value = stacked if self.layer is None else stacked[self.layer]
        value = np.split(value, self.parts, axis=-1)[self.part]
        if self.path == PATCH_EMBEDDING:
            return value.transpose(3, 2, 0, 1)
        return value.T if self.path.endswith("/kernel") else value


def gguf_table(shapes: Mapping[str, tuple[int, ...]]) -> list[GgufEntry]:
    """Return the tensors of a model, adjacent for each parameter, without logit_scale, which is in the metadata."""
    entries = []
    for path, shape in shapes.items():
        stem, _, last = path.rpartition("/")
        tower, inside, layer_name = stem.partition("/blocks/")
        if inside:
            names = _INSIDE_BLOCKS[layer_name]
            entries += [
                GgufEntry(f"{_TOWERS[tower]}.blk.{layer}.{name}{_SUFFIXES[last]}", path, layer, part, len(names))
                for layer in range(shape[0])
                for part, name in enumerate(names)
            ]
        elif path != "logit_scale":
            entries.append(GgufEntry(_OUTSIDE_BLOCKS.get(path) or _OUTSIDE_BLOCKS[stem] + _SUFFIXES[last], path))
    return entries


class GgufModel(NamedTuple):
    """The model that the metadata of a file describe.

    Attributes:
      config: the model.
      preprocess: the preprocessing of its images.
      logit_scale: the parameter logit_scale, the logarithm of the scale.
    """

    config: CLIPConfig
    preprocess: Preprocess
    logit_scale: float


class _Tower(NamedTuple):
    width: int
    hidden: int
    embed_dim: int
    heads: int
    layers: int


_TOWER_KEYS = ("embedding_length", "feed_forward_length", "projection_dim", "attention.head_count", "block_count")


def to_metadata(model: GgufModel, kind: Kind) -> dict[str, Any]:
    """Return the metadata of a file whose ternary weights are blocks of `kind`.

    Raises:
      ValueError: clip.cpp's keys cannot describe the model or its preprocessing; the message names the option.
    """
    config, preprocess, logit_scale = model
    check_expressible(
        config,
        "a GGUF of CLIP",
        *(("norm_eps", tower.norm_eps, _EPSILON) for tower in (config.vision, config.text)),
        *(("approximate", tower.approximate, "none") for tower in (config.vision, config.text)),
        ("preprocess_cfg.size", preprocess.size, config.vision.image_size),
        ("preprocess_cfg.interpolation", preprocess.interpolation, "bicubic"),
        ("preprocess_cfg.resize_mode", preprocess.resize_mode, "shortest"),
    )
    vision, text = config.vision, config.text
    towers = {
        "text": _Tower(text.width, int(text.width * text.mlp_ratio), config.embed_dim, text.heads, text.layers),
        "vision": _Tower(
            vision.width, int(vision.width * vision.mlp_ratio), config.embed_dim, vision.heads, vision.layers
        ),
    }
    metadata = {
        ARCHITECTURE_KEY: ARCHITECTURE,
        "general.description": "two-tower CLIP model",
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": _QUANTIZATION_VERSION,
        "clip.use_gelu": not config.quick_gelu,
        "clip.logit_scale": logit_scale,
        "clip.text.context_length": text.context_length,
        "clip.vision.image_size": vision.image_size[0],
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.image_mean": preprocess.mean,
        "clip.vision.image_std": preprocess.std,
        "tokenizer.ggml.tokens": _tokens(text.vocab_size),
    }
    for name, tower in towers.items():
        metadata[f"clip.has_{name}_encoder"] = True
        metadata[f"clip.{name}.attention.layer_norm_epsilon"] = _EPSILON
        metadata |= {f"clip.{name}.{key}": number for key, number in zip(_TOWER_KEYS, tower, strict=True)}
    return metadata


def from_metadata(metadata: Mapping[str, Any]) -> GgufModel:
    """Return the model that the metadata describe, the inverse of `to_metadata`.

    Raises:
      ValueError: the vocabulary is not CLIP's, or a key is missing or has an invalid value.
    """
    text, vision = _read_tower(metadata, "text"), _read_tower(metadata, "vision")
    if text.embed_dim != vision.embed_dim:
        raise ValueError(
            f"projection_dim is {text.embed_dim} for text and {vision.embed_dim} for images: they must agree"
        )
    if vision.width % vision.heads or text.width % text.heads:
        raise ValueError(
            f"attention.head_count of {text.heads} (text) or {vision.heads} (vision) does not divide the width"
        )
    tokens = _get(metadata, "tokenizer.ggml.tokens", list)
    if tokens != _tokens(len(tokens)):
        raise ValueError("tokenizer.ggml.tokens is not CLIP's vocabulary in its order")
    size = _size(metadata, "clip.vision.image_size")
    config = CLIPConfig(
        embed_dim=text.embed_dim,
        vision=VisionConfig(
            image_size=(size, size),
            patch_size=_size(metadata, "clip.vision.patch_size"),
            width=vision.width,
            layers=vision.layers,
            head_width=vision.width // vision.heads,
            mlp_ratio=mlp_ratio(vision.width, vision.hidden),
        ),
        text=TextConfig(
            context_length=_size(metadata, "clip.text.context_length"),
            vocab_size=len(tokens),
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=mlp_ratio(text.width, text.hidden),
        ),
        quick_gelu=not _get(metadata, "clip.use_gelu", bool),
    )
    mean, std = (_decimals(metadata, f"clip.vision.image_{name}") for name in ("mean", "std"))
    if "clip.logit_scale" not in metadata:  # clip.cpp's converter omits it
        _logger.warning("the metadata lack clip.logit_scale: using ln(100), the value of OpenAI's models")
    logit_scale = _get({"clip.logit_scale": math.log(100), **metadata}, "clip.logit_scale", float)
    if not abs(logit_scale) <= _LARGEST:
        raise ValueError(f"clip.logit_scale is {logit_scale}: its magnitude must be at most {_LARGEST}")
    return GgufModel(config, Preprocess(size, mean, std), logit_scale)


def _read_tower(metadata: Mapping[str, Any], name: str) -> _Tower:
    if not _get(metadata, f"clip.has_{name}_encoder", bool):
        raise ValueError(f"it has no {name} encoder: only a CLIP with two towers can be read")
    key = f"clip.{name}.attention.layer_norm_epsilon"
    epsilon = _get(metadata, key, float)
    if not math.isclose(epsilon, _EPSILON, rel_tol=1e-6):
        raise ValueError(f"{key} is {epsilon:.6g}: it must be {_EPSILON}")
    tower = _Tower(*(_size(metadata, f"clip.{name}.{key}") for key in _TOWER_KEYS))
    if tower.layers > _MOST_LAYERS:
        raise ValueError(f"clip.{name}.block_count is {tower.layers}: at most {_MOST_LAYERS} are read")
    return tower


def _get(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T:
    if key not in metadata:
        raise ValueError(f"the metadata lack {key}")
    # Not isinstance, which accepts a bool as an int.
    if type(metadata[key]) is not kind:
        raise ValueError(f"{key} is {type(metadata[key]).__name__}: it must be {kind.__name__}")
    return metadata[key]


def _size(metadata: Mapping[str, Any], key: str) -> int:
    number = _get(metadata, key, int)
    if not 1 <= number <= _LARGEST:
        raise ValueError(f"{key} is {number}: it must be from 1 to {_LARGEST}")
    return number


def _decimals(metadata: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """Return decimals that round to the three float32 values: OpenAI's constants if they match, else the shortest."""
    values = _get(metadata, key, np.ndarray)
    if values.dtype != np.float32 or values.shape != (3,) or not np.isfinite(values).all():
        raise ValueError(f"{key} must hold three finite FLOAT32")
    for known in (OPENAI_MEAN, OPENAI_STD):
        if np.array_equal(values, np.asarray(known, np.float32)):
            return known
    return tuple(float(str(value)) for value in values)


def _tokens(count: int) -> list[str]:
    if not 1 <= count <= VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {count} tokens: CLIP's has 1 to {VOCAB_SIZE}")
    return list(json.loads(vocabulary_files()["vocab.json"]))[:count]
