"""Export a model as a folder for PyTorch whose ternary weights stay packed at two bits, with the package that runs it.

    torch/model.safetensors  packed words and scales (`NAME.words`, `NAME.scales`) and float32, by open_clip's names
    torch/config.json        the model, its packed weights, and the names of the tensors in transformers' CLIPModel
    torch/tclip_torch/       the package: layers over one operator, and the C++ kernel of this package
    torch/pyproject.toml     builds it: pip install torch/

The weights of the blocks and the token embedding are packed. Ternary patch embeddings and projections, which the
presets leave float, are written as scale · trit.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from tclip_jax.artifacts.pack import check_no_uniform, flatten
from tclip_jax.artifacts.safetensors import read_safetensors, write_safetensors
from tclip_jax.data.images import Preprocess
from tclip_jax.interop.examples import Examples
from tclip_jax.interop.hugging_face import hugging_face_table
from tclip_jax.interop.open_clip import check_options, lazy_state, open_clip_table
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TOKEN_EMBEDDING
from tclip_jax.ternary import PackedTensor, TernaryTensor, pack_rows, unpack
from tclip_jax.ternary.kernels import native_cpu

FOLDER = "torch"
BUDGET = 1e-5  # largest difference of an embedding's component from that of the model
_FORMAT = {"format": "tclip_torch", "version": 1}  # as in tclip_torch/weights.py

_HERE = pathlib.Path(__file__).resolve().parents[1]
# In a wheel the package and its build script are within this one, in a checkout beside it.
_SHIPPED = _HERE / "tclip_torch" if (_HERE / "tclip_torch").is_dir() else _HERE.parent / "tclip_torch"
_BUILD = next(path for path in (_SHIPPED, _HERE.parent) if (path / "hatch_build.py").is_file()) / "hatch_build.py"

# Runs in the folder, in a process of its own, which cannot import this package or jax.
_CHECK = """\
import sys, warnings
sys.modules["tclip_jax"] = sys.modules["jax"] = None
warnings.simplefilter("ignore")
import torch, tclip_torch
from safetensors.torch import load_file
given = load_file(sys.argv[1])
with torch.inference_mode():
    image, text = tclip_torch.load(".", "A32")(given["pixels"], given["tokens"])
for name, values in ("image", image), ("text", text):
    print(name, (values - given[name]).abs().max().item())
"""


def write_torch(folder: epath.Path, *, config: CLIPConfig, preprocess: Preprocess, params: Mapping[str, Any]) -> None:
    """Write the weights and the package into `folder`, a new folder.

    Args:
      folder: the folder, local or remote.
      config: the model.
      preprocess: the preprocessing of its images, for the reader of config.json.
      params: parameter tree with `TernaryTensor` leaves; other leaves may be lazy.

    Raises:
      ValueError: the package has no layer for an option of the model, such as those of SigLIP; the message names it.
    """
    _check_supported(config)
    check_no_uniform(params, "packed PyTorch")
    folder.mkdir(parents=True, exist_ok=True)
    packed = dict(_packed(params, config))
    tensors: dict[str, Any] = {}
    for name, value in lazy_state(params, config).items():
        if name in packed:
            words, scales = _arrays(packed[name])
            tensors |= {f"{name}.words": words, f"{name}.scales": scales}
        else:
            tensors[name] = value
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    described = _FORMAT | {
        "model_cfg": config.to_open_clip(),
        "preprocess_cfg": preprocess.to_open_clip(),
        "packed": {name: {"shape": _torch_shape(w), "group": w.group} for name, w in packed.items()},
        "transformers": _transformers_names(config),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    for source, name in package_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        epath.Path(source).copy(folder / name)


def verify_torch(folder: epath.Path, *, config: CLIPConfig, params: Mapping[str, Any], examples: Examples) -> str:
    """Compare a written folder with the model: weights bit for bit, embeddings to within `BUDGET`.

    The package runs in a process that cannot import this one, without its native kernel and with exact activations.

    Args:
      folder: what `write_torch` wrote.
      config: the model.
      params: the parameters that were written.
      examples: inputs, and the embeddings of the model.

    Returns:
      A line on the embeddings, or on why they were not compared.

    Raises:
      ValueError: a weight or an embedding differs, or the package fails; the message names it.
    """
    stored = read_safetensors(folder / "model.safetensors")
    packed = dict(_packed(params, config))
    for name, expected in lazy_state(params, config).items():
        if name in packed:
            words, scales = (np.asarray(stored[f"{name}.{part}"]) for part in ("words", "scales"))
            own: Any = {"data": words.view(packed[name].data.dtype), "scale": scales}
            dense = np.asarray(unpack(dataclasses.replace(packed[name], **own)).dequantize())
            value = dense.T if packed[name].layout == native_cpu.NAME else dense
        else:
            value = np.asarray(stored[name])
        if not np.array_equal(value, np.asarray(expected)):
            raise ValueError(f"{folder / 'model.safetensors'}: {name} is not the weight of the model")
    if not importlib.util.find_spec("torch") or not importlib.util.find_spec("safetensors"):
        return f"{FOLDER}: weights verified; PyTorch is not installed, so embeddings were not compared with JAX's"
    with tempfile.TemporaryDirectory() as temporary:
        local = pathlib.Path(temporary)
        names = ["config.json", "model.safetensors", *(name for _, name in package_files())]
        for name in names:
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).copy(epath.Path(local / name))
        given = {
            "pixels": np.ascontiguousarray(examples.pixels.transpose(0, 3, 1, 2)),
            "tokens": examples.tokens.astype(np.int64),
            "image": examples.image,
            "text": examples.text,
        }
        write_safetensors(local / "examples.safetensors", given)
        environment = os.environ | {"PYTHONPATH": str(local), "TCLIP_TORCH_LIBRARY": os.devnull}
        command = [sys.executable, "-c", _CHECK, "examples.safetensors"]
        ran = subprocess.run(command, cwd=local, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise ValueError(f"{folder / 'tclip_torch'} fails: {['no message', *ran.stderr.strip().splitlines()][-1]}")
    errors = {tower: float(error) for tower, error in map(str.split, ran.stdout.splitlines())}
    for tower, error in errors.items():
        if not error <= BUDGET:
            raise ValueError(f"{folder}: its {tower} embeddings differ by {error} from those of the model")
    return f"{FOLDER}: weights verified; embeddings differ by at most {max(errors.values()):.1e} from JAX's"


def _check_supported(config: CLIPConfig) -> None:
    vision, text = config.vision, config.text
    check_options(
        "packed PyTorch",
        ("vision_cfg.class_token", vision.class_token, True),
        ("vision_cfg.patch_bias", vision.patch_bias, False),
        ("vision_cfg.projection", vision.projection, True),
        ("text_cfg.pool_type", text.pool_type, "last" if text.pool_type == "last" else "argmax"),
        ("text_cfg.proj_bias", text.proj_bias, False),
        ("text_cfg.proj_type", text.proj_type, "linear"),
        *(("norm_eps", tower.norm_eps, 1e-5) for tower in (vision, text)),
        *(("approximate", tower.approximate, "none") for tower in (vision, text)),
        ("init_logit_bias", config.init_logit_bias, None),
    )


def _packed(params: Mapping[str, Any], config: CLIPConfig) -> Iterator[tuple[str, PackedTensor]]:
    """Yield open_clip's name and the packed weight of each ternary layer that PyTorch has a layer for."""
    leaves = flatten(params)
    for entry in open_clip_table(config):
        leaf = leaves[entry.path]
        if not isinstance(leaf, TernaryTensor):
            continue
        if entry.path == TOKEN_EMBEDDING:
            yield entry.key, pack_rows(leaf)
        elif entry.layer is not None:
            layer = entry.layer
            yield entry.key, native_cpu.pack(jax.tree.map(lambda stacked, i=layer: stacked[i], leaf))


def _arrays(w: PackedTensor) -> tuple[np.ndarray, np.ndarray]:
    """Return words and scales as they are stored; PyTorch computes with signed words."""
    words = np.asarray(w.data)
    return (words.view(np.int32) if words.dtype == np.uint32 else words), np.asarray(w.scale)


def _torch_shape(w: PackedTensor) -> tuple[int, int]:
    """Return the shape of the weight in PyTorch: (N, K) of a kernel, (V, W) of a table."""
    return w.layer_shape[::-1] if w.layout == native_cpu.NAME else w.layer_shape


def _transformers_names(config: CLIPConfig) -> dict[str, tuple[str, int | None, bool]] | None:
    """Return CLIPModel's names with open_clip's name, third and transposition; None if it cannot express the model."""
    try:
        return {entry.key: (entry.open_clip, entry.third, entry.transposed) for entry in hugging_face_table(config)}
    except ValueError:
        return None


def package_files() -> Iterator[tuple[pathlib.Path, str]]:
    """Yield the path and the name in the folder of each file of the package, sources of the kernel included."""
    yield _SHIPPED / "pyproject.toml", "pyproject.toml"
    yield _BUILD, "hatch_build.py"
    for path in sorted(_SHIPPED.glob("*.py")):
        if path != _BUILD:
            yield path, f"tclip_torch/{path.name}"
    native = native_cpu.LIBRARY.parent
    for path in sorted(native.iterdir()):
        if path.suffix in (".h", ".inc") or path.name == "plain.cc":
            yield path, f"tclip_torch/native/{path.name}"
