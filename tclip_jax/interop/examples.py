"""Inputs with their embeddings in JAX, and the script that compares those of open_clip and transformers with them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.safetensors import write_safetensors
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.ternary import TernaryTensor

SCRIPT, DATA = "check.py", "check.safetensors"

_SCRIPT = '''\
"""Do open_clip and transformers compute from these files what JAX computed at export? python check.py"""

import importlib.util
import pathlib
import sys

import torch
from safetensors.torch import load_file

folder = pathlib.Path(__file__).resolve().parent
stored = load_file(folder / "check.safetensors")
found = {}
with torch.no_grad():
    if (folder / "open_clip_model.safetensors").exists() and importlib.util.find_spec("open_clip"):
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}", precision="fp32").eval()
        found["open_clip image"] = model.encode_image(stored["pixels"], normalize=True)
        found["open_clip text"] = model.encode_text(stored["tokens"], normalize=True)
    if (folder / "model.safetensors").exists() and importlib.util.find_spec("transformers"):
        from transformers import CLIPModel

        output = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()(
            pixel_values=stored["pixels"], input_ids=stored["tokens"]
        )
        found["transformers image"], found["transformers text"] = output.image_embeds, output.text_embeds
errors = {name: (embedding - stored[name.split()[1]]).abs().max().item() for name, embedding in found.items()}
for name, error in errors.items():
    print(f"{name} embeddings: max |difference| {error:.1e}")
sys.exit(0 if errors and all(error <= 1e-5 for error in errors.values()) else "not the exported model, or no library")
'''


class Examples(NamedTuple):
    """Inputs, and the embeddings of a model.

    Attributes:
      pixels: normalised images (N, H, W, 3) float32.
      tokens: (N, T) int32.
      image: (N, embed_dim) float32, of length 1.
      text: likewise.
    """

    pixels: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    image: npt.NDArray[np.float32]
    text: npt.NDArray[np.float32]


def make_examples(config: CLIPConfig, params: Mapping[str, Any], *, dtype: str = "float32", count: int = 4) -> Examples:
    """Noise and random tokens, always the same, that fill the context or a part of it; computed at full precision.

    Args:
      params: packed; other leaves may be lazy, and are then read.
      dtype: that the weights are rounded to, as `export_pytorch` stores them.
    """
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((count, *config.vision.image_size, 3), np.float32)
    length, end = config.text.context_length, config.text.vocab_size - 1
    tokens = rng.integers(0, end, (count, length), np.int32)
    for row, last in enumerate(rng.integers(length // 2, length, count)):
        # The end of text is the highest token; every second text goes on to the last position.
        last = length - 1 if row % 2 else last
        tokens[row, last], tokens[row, last + 1 :] = end, 0
    rounded = jax.tree.map(
        functools.partial(_rounded, dtype=jnp.dtype(dtype)),
        params,
        is_leaf=lambda leaf: isinstance(leaf, TernaryTensor),
    )
    with jax.default_matmul_precision("highest"):
        image, text = _embed(CLIP(config), rounded, pixels, tokens)
    return Examples(pixels, tokens, np.asarray(image), np.asarray(text))


def write_check(folder: epath.Path, examples: Examples) -> None:
    """The script, and its data in PyTorch's layout: (N, 3, H, W) and int64."""
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


def _rounded(leaf: Any, dtype: np.dtype[Any]) -> Any:
    """A weight as the export stores it, on the device; the model computes with it in float32."""
    if not isinstance(leaf, TernaryTensor):
        return jax.device_put(np.asarray(leaf).astype(dtype, copy=False))
    scale: Any = np.asarray(leaf.scale).astype(dtype).astype(np.float32)
    return TernaryTensor(leaf.trits, scale, leaf.group, leaf.axis)
