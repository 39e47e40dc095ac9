"""Run the towers of a LiteRT export in ai-edge-litert, and record the taps, which their files name, as outputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.interop.formats import LITERT_FOLDER
from tclip_jax.interop.litert import FILES, read_metadata
from tclip_jax.interop.litert_flatbuffer import Flatbuffer
from tclip_jax.interop.litert_session import run_litert, runtime_version
from tclip_jax.interop.litert_tower import OUTPUTS
from tclip_jax.keys import Recipe
from tclip_jax.models.config import CLIPConfig
from tclip_jax.numerics.configurations import recipe_of_towers
from tclip_jax.numerics.golden import Recording
from tclip_jax.numerics.taps import Taps, tap_names
from tclip_jax.numerics.torch_side import library_of
from tclip_jax.storage import is_local


def litert_files(path: epath.PathLike) -> dict[str, epath.Path]:
    """Return the files of both towers, by tower; none if `path` is no LiteRT export.

    Args:
      path: a folder with the files, a folder with a subfolder "litert" and no weights of PyTorch, or the file of a
        tower, beside which the other is.
    """
    path = epath.Path(path)
    if not is_local(path):
        return {}
    if path.suffix == ".tflite":
        folders = [path.parent] if path.name in FILES.values() else []
    else:
        folders = [path] if library_of(path) else [path, path / LITERT_FOLDER]
    pairs = ({tower: folder / name for tower, name in FILES.items()} for folder in folders)
    return next((pair for pair in pairs if all(file.is_file() for file in pair.values())), {})


def litert_recipe(files: dict[str, epath.Path]) -> Recipe:
    """Return what both files state, as `model_recipe`.

    Raises:
      ValueError: a file is damaged, or they are of different models.
    """
    return recipe_of_towers(files, {tower: read_metadata(file)[0] for tower, file in files.items()})


def record_litert(
    files: dict[str, epath.Path],
    config: CLIPConfig,
    pixels: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
) -> Recording:
    """Record the activations of a LiteRT export, with the names and shapes of `collect_taps`.

    Args:
      files: the files by tower, from `litert_files`.
      config: the configuration of the model.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.

    Raises:
      ValueError: a file is damaged or was not written by `tclip export`, or ai-edge-litert is missing or too old.
    """
    names, pooled = tap_names(config), ["text/ln_final", "image/projection", "text/projection"]
    if config.vision.final_ln_after_pool or config.vision.pool_type == "tok":
        pooled.append("image/ln_post")
    projected = {"image": config.vision.projection, "text": config.text.proj_type == "linear"}
    taps: Taps = {}
    for tower, inputs in (("image", pixels), ("text", tokens)):
        file = Flatbuffer(files[tower])
        # Without a projection the last of the pooled taps is the output, too.
        last = ("/projection",) if projected[tower] else ("/projection", "/ln_post", "/ln_final")
        stored = {name: OUTPUTS[tower] if name in pooled and name.endswith(last) else name for name in names}
        wanted = [name for name in names if name.startswith(f"{tower}/") and not name.endswith("/embedding")]
        missing = [name for name in wanted if stored[name] not in file.names()]
        if missing:
            raise ValueError(f"{file.path}: no value {missing[0]}: only files of `tclip export` can be compared")
        content, indices = file.with_outputs([stored[name] for name in wanted])
        for name, value in zip(wanted, run_litert(content, inputs, indices), strict=True):
            taps[name] = value[:, 0] if name in pooled else value
        length = np.maximum(np.linalg.norm(taps[f"{tower}/projection"], axis=-1, keepdims=True), 1e-12)
        taps[f"{tower}/embedding"] = taps[f"{tower}/projection"] / length
    facts = {"run by": f"ai-edge-litert {runtime_version()} on the CPU, {files['image'].name} and {files['text'].name}"}
    _, logit_scale = read_metadata(files["image"])
    return Recording(pixels, tokens, {name: taps[name] for name in names}, logit_scale, facts)
