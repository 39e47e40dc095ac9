"""Read weights files of other libraries lazily: safetensors, PyTorch pickles, TorchScript archives, and their shards.

For a file of another kind, the error names the kind, which the first bytes of the file identify.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.manifest import refuse_constant
from tclip_jax.artifacts.safetensors import LazyArray, read_safetensors
from tclip_jax.interop.torchscript import is_torchscript, read_torchscript
from tclip_jax.schema import plain
from tclip_jax.storage import is_local

PYTORCH, SAFETENSORS, GGUF = "a PyTorch file", "a safetensors file", "a GGUF"
NPZ = "an archive of NumPy arrays (.npz)"

_HEAD = 512
_MAX_MEMBERS = 10_000
# Patterns for the first bytes of a file, tested in this order.
_BEGINNINGS = (
    (rb"\s*<(!doctype html|html|\?xml|head|!--)", "a web page (HTML), not the file itself"),
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer: `git lfs pull` downloads the file itself"),
    (rb"GGUF", GGUF),
    (rb"\x89HDF\r\n", "an HDF5 file, of Keras or TensorFlow"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"PAR1", "a Parquet table"),
    (rb".{4}TFL3", "a model of TensorFlow Lite"),
    (rb"\x1f\x8b|\xfd7zXZ|BZh\d|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "a compressed file: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"\x08[\x01-\x0f]\x12.[\w./-]", "an ONNX model"),
    (rb"\x08\x01\x12", "a SavedModel of TensorFlow"),
    (rb"\x80[\x02-\x05]", PYTORCH),
    (rb".{6}\0\0\{", SAFETENSORS),
    (rb"(\x81|\x82|[\x83-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", "parameters of Flax (msgpack)"),
    (rb"\s*[{\[]", "JSON text"),
    (rb"\0{64}", "only zeros, like an unfinished download"),
)
_FILES = (
    ("adapter_config.json", "an adapter (LoRA): merge it into its model and save the result"),
    ("*.msgpack", "weights of Flax"),
    ("*.h5", "weights of Keras or TensorFlow"),
    ("saved_model.pb", "a SavedModel of TensorFlow"),
    ("*.ckpt*.index", "a checkpoint of TensorFlow"),
    ("*.onnx", "an ONNX model"),
    ("*.tflite", "a model of TensorFlow Lite"),
    ("*.gguf", "a GGUF: pass that file instead of the folder"),
    ("*.npz", "NumPy arrays: if they are of big_vision, pass that file instead of the folder"),
)

INDEX = ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Keys under which training loops store the weights, next to their own state.
_HOLDERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_JSON = 64 * 2**20
# Dtypes of tensors in pickles. PyTorch has more, without a NumPy equivalent or complex, but weights do not use them.
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


class Weights(NamedTuple):
    """Lazy tensors by the names in their file, and the files that hold them."""

    tensors: Mapping[str, LazyArray]
    files: tuple[epath.Path, ...]


def open_weights(path: epath.PathLike) -> Weights:
    """Open a .safetensors, .bin, .pt, .pth or .ckpt file, or all shards of an .index.json, without reading tensors.

    Raises:
      FileNotFoundError: the file or a shard is missing.
      ValueError: the file has another kind, is damaged, or holds more than tensors. One line names the file.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(INDEX):
        return _open_shards(path)
    try:
        if path.suffix == ".safetensors":
            expected = SAFETENSORS
            return Weights(read_safetensors(path), (path,))
        if path.suffix in _PICKLES:
            expected = PYTORCH
            return Weights(read_torchscript(path) if is_torchscript(path) else _read_pickle(path), (path,))
    except ValueError:
        check_file_kind(path, expected)
        raise
    kind = file_kind(path) or path.suffix or "without suffix"
    raise ValueError(f"{path}: a weights file is .safetensors, {', '.join(_PICKLES)}, .gguf or .npz, not {kind}")


def read_json(path: epath.Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      ValueError: the file is too long, is not JSON, or does not hold an object.
    """
    if path.stat().length > _MAX_JSON:
        raise ValueError(f"{path} has {path.stat().length} bytes: at most {_MAX_JSON} are read")
    try:
        document = json.loads(path.read_text(), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}: it must be a JSON object")
    return document


def check_object(name: str, value: Any) -> None:
    """Raise ValueError unless `value`, from JSON, is an object."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r:.80}: it must be a JSON object")


def _open_shards(index: epath.Path) -> Weights:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"\w[\w.-]*", file) and not file.endswith(INDEX)
        for file in names.values()
    ):
        raise ValueError(f"{index}: weight_map must give a plain file name for each tensor")
    files = [index.parent / file for file in sorted(set(names.values()))]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: {index.name} names it as a shard")
    shards = {file.name: open_weights(file).tensors for file in files}
    for name, file in names.items():
        if name not in shards[file]:
            raise ValueError(f"{index.parent / file} lacks {plain(name)}: {index.name} lists it there")
    return Weights({name: shards[file][name] for name, file in names.items()}, tuple(files))


def _read_pickle(path: epath.Path) -> dict[str, LazyArray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        install = "pip install 'tclip-jax[torch]'"
        raise ValueError(
            f"{path} is a pickle, which needs PyTorch ({install}): install it, or convert the file to .safetensors"
        ) from None
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A memory map makes the tensors lazy; torch.load can map only local zip files.
            mapped = is_local(path) and zipfile.is_zipfile(path)
            loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped or None)
    # Damaged and hostile files raise errors of pickle, zipfile and torch, or any other that their content provokes.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it holds {refused[1]}, and only tensors are read"
            if refused
            else plain(str(error).partition("\n")[0], 200)
        )
        raise ValueError(f"{path} is refused by torch.load(weights_only=True): {reason}") from None
    holders = [name for name in _HOLDERS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    state = loaded[holders[0]] if holders else loaded
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} holds no state dict: it must map names to tensors, itself or under {', '.join(_HOLDERS)}"
        )
    return {key: _from_torch(path, key, value) for key, value in state.items()}


def _from_torch(path: epath.Path, key: str, tensor: Any) -> LazyArray:
    name = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.is_meta:
        raise ValueError(f"{path}: {plain(key)} is sparse, nested or without values: only dense tensors are read")
    if name not in _DTYPES:
        raise ValueError(f"{path}: {plain(key)} is {name}: only {', '.join(_DTYPES)} are read")
    dtype = jnp.dtype(name)
    # Reject strides of 0: with them a small file could expand to much memory.
    if tensor.numel() * dtype.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {plain(key)} has shape {tuple(tensor.shape)}: its storage is too small")
    return LazyArray(tuple(tensor.shape), dtype, functools.partial(_as_numpy, tensor, dtype))


def _as_numpy(tensor: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype == jnp.bfloat16:  # torch cannot convert bfloat16 to NumPy: convert its bits
        return tensor.detach().contiguous().view(importlib.import_module("torch").uint16).numpy().view(dtype)
    return tensor.numpy(force=True)  # force resolves lazy negation and conjugation


def file_kind(path: epath.Path) -> str | None:
    """Return a description of a file's kind, from its first bytes or its members if it is a zip; None if unknown."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\3\4"):
        return _zip_kind(path)
    for pattern, words in _BEGINNINGS:
        if re.match(pattern, head.lower() if b"html" in pattern else head, re.DOTALL):
            return words
    return None


def check_file_kind(path: epath.Path, expected: str) -> None:
    """Raise ValueError if the file is known to have another kind than `expected`."""
    kind = file_kind(path)
    if kind not in (None, expected):
        raise ValueError(f"{path} is not {expected}, but {kind}") from None


def folder_kind(path: epath.Path) -> str:
    """Return a clause for the error about a folder without weights: a file of another known kind in it, or ""."""
    for pattern, words in _FILES:
        for file in sorted(path.glob(pattern)):
            return f"; its {file.name} is {words}"
    return ""


def _zip_kind(path: epath.Path) -> str:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()[:_MAX_MEMBERS]
    # A damaged directory of a zip raises many kinds of errors.
    except Exception:
        return PYTORCH if path.suffix != ".zip" else "a damaged zip archive"
    if any(name.endswith((".pkl", "/version")) for name in names):
        return PYTORCH
    if any(name.endswith(".npy") for name in names):
        return NPZ
    return "a zip archive: unpack it first"
