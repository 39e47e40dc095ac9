"""Run the towers of an ONNX export in ONNX Runtime, and record the taps as further outputs of their graphs."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.interop.formats import ONNX_FOLDER
from tclip_jax.interop.onnx import FILES, parse_onnx, read_metadata, read_quantized
from tclip_jax.interop.onnx_graph import OUTPUTS, onnx_package
from tclip_jax.interop.onnx_session import run_onnx, runtime_version
from tclip_jax.keys import Recipe
from tclip_jax.models.config import CLIPConfig
from tclip_jax.numerics.configurations import recipe_of_towers
from tclip_jax.numerics.golden import Recording
from tclip_jax.numerics.taps import Taps, tap_names
from tclip_jax.numerics.torch_side import library_of
from tclip_jax.storage import is_local

# Products that round activations to int8, by 0.5 % of their RMS: at a tap of ViT-B/16 the largest error is about 4e-2.
ROUNDED_BUDGET = 0.1

_SUFFIXES = ("_q2", "_q2f16", "_q4", "_q4f16", "_quantized", "", "_fp16")  # in order of preference


def onnx_files(path: epath.PathLike) -> dict[str, epath.Path]:
    """Return the files of both towers, by tower; none if `path` is no ONNX export.

    Args:
      path: a folder with the files, a folder with a subfolder "onnx" and no weights of PyTorch, or the file of a tower,
        beside which the other has the same suffix. Of several kinds in a folder the packed one is chosen.
    """
    path = epath.Path(path)
    if not is_local(path):
        return {}
    if path.suffix == ".onnx":
        match = re.fullmatch(rf"(?:{'|'.join(FILES.values())})(\w*)\.onnx", path.name)
        return _pair(path.parent, match[1]) if match else {}
    pairs = [_pair(path, suffix) for suffix in _SUFFIXES]
    if not any(pairs) and (path / ONNX_FOLDER).is_dir() and not library_of(path):
        pairs = [_pair(path / ONNX_FOLDER, suffix) for suffix in _SUFFIXES]
    return next((pair for pair in pairs if pair), {})


def _pair(folder: epath.Path, suffix: str) -> dict[str, epath.Path]:
    files = {tower: folder / f"{name}{suffix}.onnx" for tower, name in FILES.items()}
    return files if all(file.is_file() for file in files.values()) else {}


def onnx_recipe(files: dict[str, epath.Path]) -> Recipe:
    """Return what both files state, as `model_recipe`.

    Raises:
      ValueError: a file is damaged, or they are of different models.
    """
    return recipe_of_towers(files, {tower: read_metadata(file)[0] for tower, file in files.items()})


def rounds_activations(files: dict[str, epath.Path]) -> bool:
    """Whether a product of the files rounds activations, at accuracy_level 4."""
    return any(node.accuracy_level == 4 for file in files.values() for node in read_quantized(file).values())


def record_onnx(
    files: dict[str, epath.Path],
    config: CLIPConfig,
    pixels: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
) -> Recording:
    """Record the activations of an ONNX export, with the names and shapes of `collect_taps`.

    Args:
      files: the files by tower, from `onnx_files`.
      config: the configuration of the model.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.

    Raises:
      ValueError: a file is damaged or was not written by `tclip export`, or ONNX Runtime is missing or too old.
    """
    onnx, names = onnx_package(), tap_names(config)
    taps: Taps = {}
    version = runtime_version(packed=any(read_quantized(file) for file in files.values()))
    for tower, inputs in (("image", pixels), ("text", tokens)):
        model = parse_onnx(files[tower])
        values = {output for node in model.graph.node for output in node.output}
        wanted = [name for name in names if name in values and name.startswith(f"{tower}/")]
        for name in wanted:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        outputs = run_onnx(model.SerializeToString(), tower, inputs, [*wanted, OUTPUTS[tower]])
        *found, projection = outputs
        taps |= dict(zip(wanted, found, strict=True)) | {f"{tower}/projection": projection}
        length = np.maximum(np.linalg.norm(projection, axis=-1, keepdims=True), 1e-12)
        taps[f"{tower}/embedding"] = projection / length
    missing = [name for name in names if name not in taps]
    if missing:
        raise ValueError(
            f"{files['image'].parent}: no value {missing[0]}: only files of `tclip export` can be compared"
        )
    facts = {"run by": f"onnxruntime {version} on the CPU, {files['image'].name} and {files['text'].name}"}
    _, logit_scale = read_metadata(files["image"])
    return Recording(pixels, tokens, {name: taps[name] for name in names}, logit_scale, facts)
