"""Write inputs with JAX's embeddings, and a script that compares them with those of open_clip and transformers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import write_safetensors
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.ternary import QuantizedTensor, TernaryTensor, UniformTensor

SCRIPT, DATA = "check.py", "check.safetensors"

_SCRIPT = '''\
"""Compare the embeddings of open_clip and transformers with those that JAX computed at export: python check.py"""

import importlib
import importlib.util
import pathlib
import sys

import torch
from safetensors.torch import load_file

folder = pathlib.Path(__file__).resolve().parent
stored = load_file(folder / "check.safetensors")
embeddings = {}


def library(weights, name):
    """Import a library that is installed and has weights here; None if there is none, or if the import fails."""
    if (folder / weights).exists() and importlib.util.find_spec(name.partition(".")[0]):
        try:
            return importlib.import_module(name)
        except Exception as error:  # torchvision raises RuntimeError if it does not fit torch
            print(f"{name.partition('.')[0]} cannot be imported: {' '.join(repr(error).split())}")
    return None


with torch.no_grad():
    if open_clip := library("open_clip_model.safetensors", "open_clip"):
        model = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
        embeddings["open_clip image"] = model.encode_image(stored["pixels"], normalize=True)
        embeddings["open_clip text"] = model.encode_text(stored["tokens"], normalize=True)
    if clip := library("model.safetensors", "transformers.models.clip.modeling_clip"):
        output = clip.CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()(
            pixel_values=stored["pixels"], input_ids=stored["tokens"]
        )
        embeddings["transformers image"], embeddings["transformers text"] = output.image_embeds, output.text_embeds
errors = {name: (values - stored[name.split()[1]]).abs().max().item() for name, values in embeddings.items()}
for name, error in errors.items():
    print(f"{name} embeddings: max |difference| {error:.1e}")
sys.exit(0 if errors and all(error <= 1e-5 for error in errors.values()) else "not the exported model, or no library")
'''


class Examples(NamedTuple):
    """Example inputs, and a model's embeddings of them.

    Attributes:
      pixels: normalised images (N, H, W, 3) float32.
      tokens: token ids (N, T) int32.
      image: L2-normalised image embeddings (N, embed_dim) float32.
      text: L2-normalised text embeddings (N, embed_dim) float32.
    """

    pixels: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    image: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]


def make_examples(
    config: CLIPConfig, params: Mapping[str, Any], *, dtype: str = "float32", floats: bool = False, count: int = 4
) -> Examples:
    """Embed fixed noise images and random texts, which fill the context or a part of it, at the highest precision.

    Args:
      config: the model.
      params: packed parameters; other leaves may be lazy.
      dtype: as in `embed`.
      floats: as in `embed`.
      count: number of images and of texts.
    """
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((count, *config.vision.image_size, 3), np.float32)
    length, end = config.text.context_length, config.text.vocab_size - 1
    tokens = rng.integers(0, end, (count, length), np.int32)
    for row, last in enumerate(rng.integers(length // 2, length, count)):
        # The end of text is the highest token id; every second text ends at the last position.
        last = length - 1 if row % 2 else last
        tokens[row, last], tokens[row, last + 1 :] = end, 0
    return Examples(pixels, tokens, *embed(config, params, pixels, tokens, dtype=dtype, floats=floats))


def embed(
    config: CLIPConfig,
    params: Mapping[str, Any],
    pixels: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    *,
    dtype: str = "float32",
    floats: bool = False,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the embeddings of images and texts as in `Examples`, at the highest precision.

    Args:
      config: the model.
      params: packed parameters; other leaves may be lazy.
      pixels: normalised images (N, H, W, 3) float32.
      tokens: token ids (M, T) int32.
      dtype: dtype in which `export_model` stores floats and scales; they are rounded to it.
      floats: the format stores quantized weights as floats, so their products scale · integer are rounded too. It
        makes no difference to trits.
    """
    rounded = jax.tree.map(
        functools.partial(_rounded, dtype=jnp.dtype(dtype), floats=floats),
        params,
        param_shapes(config),
        is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor),
    )
    with jax.default_matmul_precision("highest"):
        image, text = _embed(CLIP(config), rounded, pixels, tokens)
    return np.asarray(image), np.asarray(text)


def write_check(folder: epath.Path, examples: Examples) -> None:
    """Write the check script, and its data in PyTorch's layout: pixels (N, 3, H, W) and tokens int64."""
    arrays = {
        "pixels": np.ascontiguousarray(examples.pixels.transpose(0, 3, 1, 2)),
        "tokens": examples.tokens.astype(np.int64),
        "image": examples.image,
        "text": examples.text,
    }
    write_safetensors(folder / DATA, arrays)
    (folder / SCRIPT).write_text(_SCRIPT)


@functools.partial(jax.jit, static_argnums=0)
def _embed(clip: CLIP, params: Any, pixels: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    image, text, _ = clip.apply({"params": params}, pixels, tokens)  # type: ignore[misc]
    return image, text


def _rounded(leaf: Any, declared: jax.ShapeDtypeStruct, dtype: np.dtype[Any], floats: bool) -> Any:
    """Round a weight as the export stores it, and move it to the device; the model computes in float32."""
    if not isinstance(leaf, TernaryTensor | UniformTensor):
        return jax.device_put(np.asarray(leaf).astype(dtype, copy=False))
    if floats and isinstance(leaf, UniformTensor):
        return leaf.dequantize().astype(dtype).reshape(declared.shape)
    scale: Any = np.asarray(leaf.scale).astype(dtype).astype(np.float32)
    return dataclasses.replace(leaf, scale=scale)
