"""Open checkpoints of other libraries, from disk or from the Hugging Face hub, with lazy parameters."""

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
from tclip_jax.data.file_tokenizer import SPIECE_MODEL, FileTokenizer
from tclip_jax.data.images import Preprocess
from tclip_jax.interop import metadata
from tclip_jax.interop.big_vision import from_big_vision, open_big_vision
from tclip_jax.interop.big_vision_config import POSITIONS, config_of_shapes, default_preprocess, warn_of_defaults
from tclip_jax.interop.gguf import read_gguf
from tclip_jax.interop.hugging_face import from_hugging_face
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP, Metadata
from tclip_jax.interop.open_clip import lazy_params, unwrapped
from tclip_jax.interop.reader import GGUF, INDEX, NPZ, check_file_kind, folder_kind, open_weights, read_json
from tclip_jax.interop.tokenizer_files import read_tokenizer
from tclip_jax.interop.torchscript import is_torchscript
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig

HUB_PREFIX = "hf-hub:"

# Name of the image position embeddings -> number of leading axes of size 1, and of tokens before the patches.
_POSITIONS = {"visual.positional_embedding": (0, 1), "visual.trunk.pos_embed": (1, 0), POSITIONS: (1, 0)}
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

# In order of preference: only one set of weights is downloaded, and open_clip's has the most complete metadata.
_HUB_WEIGHTS = (
    ["open_clip_model.safetensors"],
    ["open_clip_pytorch_model.bin"],
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
)

# Names of weights that occur only in these other kinds of models.
_KINDS = (
    (r"\blora_[AB]\b|\blora\.(up|down)\b", "an adapter (LoRA), which must be merged into its model first"),
    (r"\btext_decoder\.|\bvisual\.attn_pool\.", "a CoCa"),
    (r"\bvisual\.layer1\.", "a ResNet"),
    (
        r"\bvisual\.trunk\.(?!attn_pool|blocks|norm\.|pos_embed|patch_embed\.proj)|\bimage_encoder\.model\.",
        "an image tower of timm",
    ),
    (r"\btext\.transformer\.(embeddings|encoder|shared)\.", "a text tower of Hugging Face"),
    (r"\bself_attn\.rotary|\bmodel\.layers\.\d+\.mlp\.gate_proj\b|\btransformer\.h\.\d", "a language model"),
)


class Checkpoint(NamedTuple):
    """A checkpoint whose weights are not read yet.

    Attributes:
      config: the model's configuration.
      preprocess: the preprocessing of its images.
      params: parameter tree with lazy leaves.
      files: the files that hold the weights.
      tokenizer: what tokenizes texts, if it is not CLIP's own; None if the source has none.
    """

    config: CLIPConfig
    preprocess: Preprocess
    params: dict[str, Any]
    files: tuple[epath.Path, ...]
    tokenizer: FileTokenizer | None = None


def is_checkpoint(source: epath.PathLike) -> bool:
    """Return whether `open_checkpoint` reads `source`: a hub name, a file, or a folder of open_clip or transformers."""
    path = epath.Path(source)
    if str(source).startswith(HUB_PREFIX) or (path.exists() and not path.is_dir()):
        return True
    # The config.json of a run has no model_type.
    return (path / OPEN_CLIP).exists() or (
        (path / HUGGING_FACE).exists() and "model_type" in read_json(path / HUGGING_FACE)
    )


def open_checkpoint(source: epath.PathLike, *, like: str | None = None, image_size: int | None = None) -> Checkpoint:
    """Open a checkpoint of another library without reading its weights.

    A folder with both libraries' files and open_clip weights is read as open_clip's, whose metadata is more complete.
    A GGUF contains its own metadata and ternary weights, and is read at once.

    Args:
      source: `hf-hub:org/name`, a folder of open_clip or transformers, a weights file of open_clip, an OpenAI archive,
        a GGUF file, or an .npz of big_vision; local or remote (gs://).
      like: a preset or a JSON file of open_clip. It defines the model of a file without metadata; otherwise the
        checkpoint must match it in everything but the image size. Without it, an .npz has big_vision's defaults, which
        are logged.
      image_size: image size of the resulting model. If it or the size of `like` differs from that of the weights, the
        position embeddings are interpolated. Without either, contradictory sizes are an error.

    Raises:
      FileNotFoundError: the source or one of its files is missing.
      ValueError: the source is damaged, lacks metadata, or contradicts itself or `like`. One line names the source.
    """
    path = fetch(str(source)) if str(source).startswith(HUB_PREFIX) else epath.Path(source)
    required = metadata.from_name(like) if like else None
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, required, image_size)
    if path.suffix == ".npz" and path.is_file():
        return _open_big_vision(path, required, image_size)
    file, library = find_weights(path)
    weights = open_weights(file)
    try:
        _check_kind(weights.tensors.keys())
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    stated = _stated(path, library, weights.tensors)
    if stated is None and required is None:
        raise ValueError(f"{source} does not state its architecture: name the model with --preset or --model-cfg")
    if stated and path.is_dir():
        metadata.warn_of_contradiction(path, library, stated.config)
    try:
        config, pixels, assumed = _agreed(stated, required, image_size)
        # A JSON file without preprocess_cfg; that of a preset is known.
        unstated = stated is None and required is not None and required.assumed and str(like).endswith(".json")
        if assumed or unstated:
            metadata.warn_of_assumption(source, pixels)
        tensors = unwrapped(weights.tensors)
        _check_size(config, len(tensors))
        if any(key.startswith(("vision_model.", "text_model.")) for key in tensors):
            tensors = from_hugging_face(tensors, config)
        if required or image_size is not None:
            tensors = _on_grid(tensors, config.vision.grid)
        params = lazy_params(tensors, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    tokenizer = read_tokenizer(path, library, config.text) if path.is_dir() else None
    return Checkpoint(config, pixels, params, weights.files, tokenizer)


def fetch(source: str, *, weights: bool = True) -> epath.Path:
    """Download metadata, tokenizer and one set of weights of `hf-hub:org/name[@revision]`, and return their folder.

    Without a network connection, or with HF_HUB_OFFLINE=1, only the local cache is used.

    Raises:
      FileNotFoundError: the repository does not exist, has no weights, or is neither reachable nor cached.
    """
    name, _, revision = source.removeprefix(HUB_PREFIX).partition("@")
    snapshot = functools.partial(huggingface_hub.snapshot_download, name, revision=revision or None)
    try:
        folder = epath.Path(snapshot(allow_patterns=["*.json", SPIECE_MODEL]))
        if not weights:
            return folder
        has_open_clip = (folder / "open_clip_config.json").exists()
        for patterns in _HUB_WEIGHTS if has_open_clip else _HUB_WEIGHTS[2:]:
            snapshot(allow_patterns=patterns)
            if any(True for pattern in patterns for _ in folder.glob(pattern)):
                return folder
    # huggingface_hub raises errors of its own, of the HTTP library and of the cache, with many lines.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{source}: could not be downloaded and is not in the local cache: {reason}") from None
    raise FileNotFoundError(f"{source}: the repository has no weights of open_clip or transformers")


def resize_positions(
    embedding: npt.NDArray[Any], grid: tuple[int, int], class_token: bool = True
) -> npt.NDArray[np.float32]:
    """Interpolate position embeddings to another patch grid, as open_clip and timm do for their towers.

    The interpolation is bicubic with antialiasing; the class token's embedding is unchanged.

    Args:
      embedding: (1 + n·n, W), the class token first, then a square grid; or (n·n, W) without a class token.
      grid: height h and width w of the new grid, in patches.
      class_token: whether there is one.

    Returns:
      float32 (1 + h·w, W), or (h·w, W).

    Raises:
      ValueError: the old grid is not square.
    """
    token, patches = np.split(np.asarray(embedding, np.float32), [int(class_token)])
    side = math.isqrt(len(patches))
    if side * side != len(patches):
        raise ValueError(f"the position embedding has {len(patches)} patches: only a square grid can be resized")
    old = jnp.asarray(patches.reshape(side, side, -1))
    new = jax.image.resize(old, (*grid, old.shape[-1]), "cubic")
    return np.concatenate([token, np.asarray(new).reshape(grid[0] * grid[1], -1)])


def find_weights(path: epath.Path) -> tuple[epath.Path, str]:
    """Find the weights file of a checkpoint.

    Args:
      path: a folder, or the weights file itself.

    Returns:
      The weights file, and the name of the metadata file that describes it: OPEN_CLIP or HUGGING_FACE.

    Raises:
      FileNotFoundError: the folder has no metadata of open_clip or transformers, or no weights.
    """
    if not path.is_dir():
        return path, OPEN_CLIP
    described = [library for library in _WEIGHTS if (path / library).exists()]
    if not described:
        raise FileNotFoundError(f"{path} holds neither {OPEN_CLIP} nor {HUGGING_FACE}{folder_kind(path)}")
    possible = [(name, library) for library in described for name in _WEIGHTS[library]]
    if described == [OPEN_CLIP]:  # open_clip also loads files with the names of transformers
        possible += [(name, OPEN_CLIP) for name in _WEIGHTS[HUGGING_FACE]]
    for name, library in possible:
        if (path / name).exists():
            return path / name, library
    names = " or ".join(name for name, _ in possible)
    raise FileNotFoundError(
        f"{path} has no weights beside its {' and '.join(described)}: expected {names}{folder_kind(path)}"
    )


def described_by(folder: epath.Path) -> str:
    """Return the metadata file that describes a folder, OPEN_CLIP or HUGGING_FACE, by its weights if it has any."""
    try:
        return find_weights(folder)[1]
    except FileNotFoundError:
        return OPEN_CLIP if (folder / OPEN_CLIP).exists() else HUGGING_FACE


def _open_gguf(path: epath.Path, required: Metadata | None, image_size: int | None) -> Checkpoint:
    try:
        config, pixels, params = read_gguf(path)
    except ValueError:
        check_file_kind(path, GGUF)
        raise
    try:
        agreed = _agreed(Metadata(config, pixels), required, image_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    grid, image = agreed.config.vision.grid, params["image"]
    if grid != config.vision.grid:
        image["position_embedding"] = resize_positions(image["position_embedding"], grid)
    return Checkpoint(agreed.config, agreed.preprocess, params, (path,))


def _open_big_vision(path: epath.Path, required: Metadata | None, image_size: int | None) -> Checkpoint:
    """Open a checkpoint of big_vision. `required` is the model if given, because the shapes do not show all of it."""
    try:
        tensors = open_big_vision(path)
    except ValueError:
        check_file_kind(path, NPZ)
        raise
    try:
        shown = required
        if shown is None:
            config = config_of_shapes(tensors)
            shown = Metadata(config, default_preprocess(config))
            warn_of_defaults(path, *shown[:2])
        elif shown.assumed:
            shown = shown._replace(preprocess=default_preprocess(shown.config))
            metadata.warn_of_assumption(path, shown.preprocess)
        config, pixels, _ = _agreed(shown, None, image_size)
        _check_size(config, len(tensors))
        if required or image_size is not None:
            tensors = _on_grid(tensors, config.vision.grid)
        return Checkpoint(config, pixels, from_big_vision(tensors, config), (path,))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _stated(path: epath.Path, library: str, tensors: Mapping[str, LazyArray]) -> Metadata | None:
    """Return the metadata in a checkpoint; None for a weights file, unless it is a TorchScript archive."""
    if path.is_dir():
        return metadata.from_open_clip(path) if library == OPEN_CLIP else metadata.from_hugging_face(path)
    return metadata.from_torchscript(path, tensors) if is_torchscript(path) else None


def _agreed(stated: Metadata | None, required: Metadata | None, image_size: int | None) -> Metadata:
    """Return the model that both describe, at the requested image size, with the preprocessing that the source states.

    If it states none, the preprocessing is that of `required`, or CLIP's default.

    Raises:
      ValueError: the stated and the required model differ in more than the image size.
    """
    known = [metadata for metadata in (required, stated) if metadata]
    size = known[0].config.vision.image_size if image_size is None else (image_size, image_size)
    models = [
        dataclasses.replace(each.config, vision=dataclasses.replace(each.config.vision, image_size=size))
        for each in known
    ]
    wanted, actual = (flatten_dict(dataclasses.asdict(model), sep=".") for model in (models[0], models[-1]))
    for option in wanted:
        # The libraries have other names for the same tokenizer: what the source states is kept.
        named = option == "text.hf_tokenizer_name" and wanted[option] and actual[option]
        if wanted[option] != actual[option] and not named:
            raise ValueError(f"its {option} is {actual[option]}, but the given model's is {wanted[option]}")
    config, pixels, _ = known[0] if known[-1].assumed else known[-1]
    assumed = stated is not None and stated.assumed and (required is None or required.assumed)
    if pixels.size != config.vision.image_size:
        raise ValueError(f"its preprocessing gives images of {pixels.size}: the model takes {config.vision.image_size}")
    return Metadata(models[-1], dataclasses.replace(pixels, size=size), assumed)


def _check_size(config: CLIPConfig, tensors: int) -> None:
    """Raise ValueError for a model that is larger than its file can be, before anything is allocated for it."""
    layers = config.vision.layers + config.text.layers
    if layers > tensors:
        raise ValueError(f"the model has {layers} layers, but the file has only {tensors} tensors")
    try:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config)))
    # The metadata may hold numbers of any size, and Flax raises many kinds of errors for them.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the sizes of the model are invalid: {type(error).__name__}: {reason}") from None
    if count > MAX_PARAMETERS:
        raise ValueError(f"the model has more than {MAX_PARAMETERS} parameters, the limit")


def _check_kind(names: Collection[str]) -> None:
    """Raise ValueError if the names of the weights are those of another kind of model."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"its weights are those of {kind}: only CLIP models with open_clip's own transformers are read"
            )


def _on_grid(tensors: Mapping[str, LazyArray], grid: tuple[int, int]) -> dict[str, LazyArray]:
    """Return the tensors, with the image position embeddings interpolated to `grid` if their grid differs."""
    resized = dict(tensors)
    for key, value in tensors.items():
        name = next((name for name in _POSITIONS if key.endswith(name)), None)
        if name is None:
            continue
        led, token = _POSITIONS[name]
        shape = (1,) * led + (token + grid[0] * grid[1], *value.shape[led + 1 :])
        if value.shape != shape:
            load = functools.partial(_resized, value, shape, grid, bool(token))
            resized[key] = LazyArray(shape, np.dtype(np.float32), load)
    return resized


def _resized(
    value: LazyArray, shape: tuple[int, ...], grid: tuple[int, int], class_token: bool
) -> npt.NDArray[np.float32]:
    return resize_positions(np.asarray(value).reshape(-1, shape[-1]), grid, class_token).reshape(shape)
