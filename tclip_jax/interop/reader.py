"""The tensors of other people's weight files, unread: safetensors, PyTorch pickles, TorchScript archives, shards."""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import LazyArray, read_safetensors
from tclip_jax.interop.foreign import PYTORCH, SAFETENSORS, check_file_kind, file_kind
from tclip_jax.interop.torchscript import is_torchscript, read_torchscript
from tclip_jax.schema import plain
from tclip_jax.storage import is_local

INDEX = ".index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Under which training loops store the weights beside their own state.
_HOLDERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_JSON = 64 * 2**20
# Of tensors in pickles; PyTorch also has some without arrays in NumPy, and complex ones, which are no weights.
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


class Weights(NamedTuple):
    """Tensors by the names that their file gives them, and the files they are in."""

    tensors: Mapping[str, LazyArray]
    files: tuple[epath.Path, ...]


def open_weights(path: epath.PathLike) -> Weights:
    """The tensors of a .safetensors, .bin, .pt, .pth or .ckpt file, or of all shards that an .index.json names.

    Raises:
      FileNotFoundError: no such file, or a missing shard.
      ValueError: a file of another kind, or one that is damaged or holds more than tensors; one line naming it.
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
    raise ValueError(f"{path}: a weights file is .safetensors, {', '.join(_PICKLES)} or .gguf, not {kind}")


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ValueError: it is too long, not JSON, or not an object.
    """
    if path.stat().length > _MAX_JSON:
        raise ValueError(f"{path} has {path.stat().length} bytes: at most {_MAX_JSON} are read")
    try:
        document = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}: it must be a JSON object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its numbers")


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
            raise ValueError(f"{index.parent / file} lacks {plain(name)}, which {index.name} says it holds")
    return Weights({name: shards[file][name] for name, file in names.items()}, tuple(files))


def _read_pickle(path: epath.Path) -> dict[str, LazyArray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        install = "pip install 'tclip-jax[torch]'"
        raise ValueError(
            f"{path} is a pickle, which needs PyTorch ({install}): or convert it to .safetensors"
        ) from None
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Mapped, its tensors are read when asked for; only a local zip file can be.
            mapped = is_local(path) and zipfile.is_zipfile(path)
            loaded = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped or None)
    # Broken and hostile files raise pickle's, zipfile's and torch's errors, and whatever their content provokes.
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {found[1]}, and only tensors are read" if found else plain(str(error).partition("\n")[0], 200)
        raise ValueError(f"{path} is refused by torch.load(weights_only=True): {what}") from None
    holders = [name for name in _HOLDERS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
    state = loaded[holders[0]] if holders else loaded
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(
            f"{path} holds no state dict: it must map names to tensors, or have that under {', '.join(_HOLDERS)}"
        )
    return {key: _from_torch(path, key, value) for key, value in state.items()}


def _from_torch(path: epath.Path, key: str, tensor: Any) -> LazyArray:
    name = str(tensor.dtype).removeprefix("torch.")
    if str(tensor.layout) != "torch.strided" or tensor.is_nested or tensor.is_meta:
        raise ValueError(f"{path}: {plain(key)} is sparse, nested or without values: only dense tensors are read")
    if name not in _DTYPES:
        raise ValueError(f"{path}: {plain(key)} is {name}: only {', '.join(_DTYPES)} are read")
    dtype = jnp.dtype(name)
    # Strides of 0 would make much of little.
    if tensor.numel() * dtype.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path}: {plain(key)} has shape {tuple(tensor.shape)}: its storage is smaller")
    return LazyArray(tuple(tensor.shape), dtype, functools.partial(_as_numpy, tensor, dtype))


def _as_numpy(tensor: Any, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype == jnp.bfloat16:  # torch has no NumPy array of it: pass its bits
        return tensor.detach().contiguous().view(importlib.import_module("torch").uint16).numpy().view(dtype)
    return tensor.numpy(force=True)  # also of a view whose negation is still to be done
