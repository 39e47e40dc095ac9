"""Other people's checkpoints, opened: which model they hold, and its parameters, unread."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts.manifest import MAX_PARAMETERS
from tclip_jax.artifacts.safetensors import LazyArray
from tclip_jax.data.images import Preprocess
from tclip_jax.interop import metadata
from tclip_jax.interop.gguf import read_gguf
from tclip_jax.interop.hugging_face import from_hugging_face
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP, Metadata
from tclip_jax.interop.open_clip import lazy_params, unwrapped
from tclip_jax.interop.reader import GGUF, INDEX, check_file_kind, folder_kind, open_weights, read_json
from tclip_jax.interop.torchscript import is_torchscript
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig

HUB_PREFIX = "hf-hub:"

_POSITIONS = "visual.positional_embedding"
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    f"open_clip_model.safetensors{INDEX}",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
_WEIGHTS = {
    OPEN_CLIP: _OPEN_CLIP_WEIGHTS,
    HUGGING_FACE: ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}"),
}

# One set of weights is enough, and open_clip's comes with the metadata that says most.
_HUB_WEIGHTS = (
    ["open_clip_model.safetensors"],
    ["open_clip_pytorch_model.bin"],
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
)

# Names that only these have.
_KINDS = (
    (r"\blora_[AB]\b|\blora\.(up|down)\b", "an adapter (LoRA), which must be merged into its model first"),
    (r"\btext_decoder\.|\bvisual\.attn_pool\.", "a CoCa"),
    (r"\bvisual\.layer1\.", "a ResNet"),
    (r"\bvisual\.trunk\.attn_pool\.|\bvision_model\.head\.", "a SigLIP"),
    (r"\bvisual\.trunk\.|\bimage_encoder\.model\.", "an image tower of timm"),
    (r"\btext\.transformer\.(embeddings|encoder|shared)\.", "a text tower of Hugging Face"),
    (r"\bself_attn\.rotary|\bmodel\.layers\.\d+\.mlp\.gate_proj\b|\btransformer\.h\.\d", "a language model"),
)


class Checkpoint(NamedTuple):
    """A model that is not read yet: `params` is the parameter tree with lazy leaves, `files` hold its weights."""

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    files: tuple[epath.Path, ...]


def is_checkpoint(source: epath.PathLike) -> bool:
    """Whether this is for `open_checkpoint`: a name of the hub, a file, or a folder of open_clip or transformers."""
    path = epath.Path(source)
    if str(source).startswith(HUB_PREFIX) or (path.exists() and not path.is_dir()):
        return True
    # A run's config.json has no model_type.
    return (path / OPEN_CLIP).exists() or (
        (path / HUGGING_FACE).exists() and "model_type" in read_json(path / HUGGING_FACE)
    )


def open_checkpoint(source: epath.PathLike, *, like: str | None = None, image_size: int | None = None) -> Checkpoint:
    """Opens `hf-hub:org/name`, a folder of open_clip or transformers, a file of open_clip, an OpenAI archive, a GGUF.

    A folder of both libraries is opened as open_clip's, whose metadata say most, if it has such weights. A GGUF is read
    at once, states everything itself, and holds its ternary weights as such.

    Args:
      source: local, or gs:// and its like.
      like: a preset or a JSON file of open_clip: the model of a file that does not say it, else what it must be. Only
        the image size may differ.
      image_size: of the resulting model. For another size than the weights', asked for here or by `like`, their
        position embeddings are interpolated; never merely because a checkpoint contradicts itself.

    Raises:
      FileNotFoundError: there is no such source, or a part of it is missing.
      ValueError: a source that is damaged, lacks its metadata, or contradicts itself or `like`; one line naming it.
    """
    path = fetch(str(source)) if str(source).startswith(HUB_PREFIX) else epath.Path(source)
    given = metadata.from_name(like) if like else None
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, given, image_size)
    file, library = find_weights(path)
    weights = open_weights(file)
    try:
        _check_kind(weights.tensors.keys())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    stated = _stated(path, library, weights.tensors)
    if stated is None and given is None:
        raise ValueError(
            f"{source} does not say which model it is, nor its activation: name it (--preset, --model-cfg)"
        )
    try:
        config, pixels = _agreed(stated, given, image_size)
        tensors = unwrapped(weights.tensors)
        _check_size(config, len(tensors))
        if any(key.startswith(("vision_model.", "text_model.")) for key in tensors):
            tensors = from_hugging_face(tensors, config)
        if given or image_size is not None:
            tensors = _on_grid(tensors, config.vision.grid)
        return Checkpoint(config, pixels, lazy_params(tensors, config), weights.files)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def fetch(source: str) -> epath.Path:
    """The folder of `hf-hub:org/name[@revision]`: its JSON files, and one set of weights.

    Without network, and with HF_HUB_OFFLINE=1, that is what an earlier download left in the cache.

    Raises:
      FileNotFoundError: no such repository, no network and nothing cached, or no weights; one line.
    """
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    snapshot = functools.partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        folder = epath.Path(snapshot(allow_patterns=["*.json"]))
        has_open_clip = (folder / "open_clip_config.json").exists()
        for patterns in _HUB_WEIGHTS if has_open_clip else _HUB_WEIGHTS[2:]:
            snapshot(allow_patterns=patterns)
            if any(True for pattern in patterns for _ in folder.glob(pattern)):
                return folder
    # Its errors are the HTTP library's, the cache's and its own, and have many lines.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{source}: neither downloaded nor in the local cache: {reason}") from None
    raise FileNotFoundError(f"{source}: the repository has no weights of open_clip or transformers")


def resize_positions(embedding: npt.NDArray[Any], grid: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Position embeddings (1 + n·n, W) interpolated to (1 + h·w, W), bicubic and antialiased; the class token's stays.

    It is open_clip's `resize_pos_embed`, with its assumption that the old grid is square.

    Raises:
      ValueError: an old grid that is not.
    """
    side = math.isqrt(len(embedding) - 1)
    if side * side != len(embedding) - 1:
        raise ValueError(f"{_POSITIONS} is of {len(embedding) - 1} patches: only a square grid can be resized")
    token, patches = np.split(np.asarray(embedding, np.float32), [1])
    old = jnp.asarray(patches.reshape(side, side, -1))
    new = jax.image.resize(old, (*grid, old.shape[-1]), "cubic")
    return np.concatenate([token, np.asarray(new).reshape(grid[0] * grid[1], -1)])


def find_weights(path: epath.Path) -> tuple[epath.Path, str]:
    """The weights in a folder, or the file itself, and what describes such weights: OPEN_CLIP or HUGGING_FACE.

    Raises:
      FileNotFoundError: a folder of neither open_clip nor transformers, or one without weights.
    """
    if not path.is_dir():
        return path, OPEN_CLIP
    described = [library for library in _WEIGHTS if (path / library).exists()]
    if not described:
        raise FileNotFoundError(f"{path} holds neither {OPEN_CLIP} nor {HUGGING_FACE}{folder_kind(path)}")
    possible = [(name, library) for library in described for name in _WEIGHTS[library]]
    if described == [OPEN_CLIP]:  # which takes the other's names too
        possible += [(name, OPEN_CLIP) for name in _WEIGHTS[HUGGING_FACE]]
    for name, library in possible:
        if (path / name).exists():
            return path / name, library
    names = " or ".join(name for name, _ in possible)
    raise FileNotFoundError(
        f"{path} has no weights beside its {' and '.join(described)}: expected {names}{folder_kind(path)}"
    )


def _open_gguf(path: epath.Path, given: Metadata | None, image_size: int | None) -> Checkpoint:
    try:
        config, pixels, params = read_gguf(path)
    except ValueError:
        check_file_kind(path, GGUF)
        raise
    try:
        agreed = _agreed(Metadata(config, pixels), given, image_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    grid, image = agreed.config.vision.grid, params["image"]
    if grid != config.vision.grid:
        image["position_embedding"] = resize_positions(image["position_embedding"], grid)
    return Checkpoint(*agreed, params, (path,))


def _stated(path: epath.Path, library: str, tensors: Mapping[str, LazyArray]) -> Metadata | None:
    """What a source says of its own model; a bare file says nothing, unless it is an archive with its program."""
    if path.is_dir():
        return metadata.from_open_clip(path) if library == OPEN_CLIP else metadata.from_hugging_face(path)
    return metadata.from_torchscript(path, tensors) if is_torchscript(path) else None


def _agreed(stated: Metadata | None, given: Metadata | None, image_size: int | None) -> Metadata:
    """The model that both describe, at the size that is asked for, and the preprocessing that the source states."""
    known = [each for each in (given, stated) if each]
    size = known[0].config.vision.image_size if image_size is None else (image_size, image_size)
    models = [
        dataclasses.replace(each.config, vision=dataclasses.replace(each.config.vision, image_size=size))
        for each in known
    ]
    ours, theirs = (flatten_dict(dataclasses.asdict(model), sep=".") for model in (models[0], models[-1]))
    for option in ours:
        if ours[option] != theirs[option]:
            raise ValueError(f"its {option} is {theirs[option]}, but the given model's is {ours[option]}")
    config, pixels = known[-1]
    if pixels.size != config.vision.image_size:
        raise ValueError(f"its preprocessing gives images of {pixels.size}: the model takes {config.vision.image_size}")
    return Metadata(models[0], dataclasses.replace(pixels, size=size))


def _check_size(config: CLIPConfig, tensors: int) -> None:
    """Raises ValueError before anything is made of a model that is far larger than its file can be."""
    layers = config.vision.layers + config.text.layers
    if layers > tensors:
        raise ValueError(f"the model has {layers} layers, but the file {tensors} tensors")
    try:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))
    # Numbers of any size stand in these files, and Flax raises whatever it likes at them.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no model can have these sizes: {type(error).__name__}: {reason}") from None
    if count > MAX_PARAMETERS:
        raise ValueError(f"the model has more than {MAX_PARAMETERS} parameters: no more are read")


def _check_kind(names: Collection[str]) -> None:
    """Raises ValueError for weights that are known to be of another kind of model."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(f"its weights are those of {kind}: only CLIPs with open_clip's own transformers are read")


def _on_grid(tensors: Mapping[str, LazyArray], grid: tuple[int, int]) -> dict[str, LazyArray]:
    """The same tensors, the position embeddings of images interpolated if they are of another grid."""
    resized = dict(tensors)
    for key, value in tensors.items():
        shape = (1 + grid[0] * grid[1], *value.shape[1:])
        if key.endswith(_POSITIONS) and value.shape[:1] != shape[:1]:
            load = functools.partial(lambda value: resize_positions(np.asarray(value), grid), value)
            resized[key] = LazyArray(shape, np.dtype(np.float32), load)
    return resized
