"""TernaryCLIP (arXiv 2510.21879) in JAX: train by distillation, run packed ternary weights, export to PyTorch.

model = tclip_jax.load("runs/quickstart/artifact")
embeddings = model.encode_text(["a photo of a cat"])
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from etils import epath

    from tclip_jax import losses, models
    from tclip_jax.inference.model import Model
    from tclip_jax.ternary import Quantizer, TernaryTensor, fake_quantize, ternarize, ternary_matmul

__version__ = importlib.metadata.version("tclip-jax")
__all__ = [
    "Model",
    "Quantizer",
    "TernaryTensor",
    "__version__",
    "fake_quantize",
    "load",
    "losses",
    "models",
    "ternarize",
    "ternary_matmul",
]

# Imported on first access, so that `tclip --help` imports no JAX.
_HOMES = {"Model": "tclip_jax.inference.model", "losses": "tclip_jax", "models": "tclip_jax"} | dict.fromkeys(
    ("Quantizer", "TernaryTensor", "fake_quantize", "ternarize", "ternary_matmul"), "tclip_jax.ternary"
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tclip_jax' has no attribute {name!r}")
    if _HOMES[name] == __name__:
        return importlib.import_module(f"{__name__}.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


def load(
    path: epath.PathLike, *, implementation: str | None = None, activations: Literal["A32", "A16", "A8"] | None = None
) -> Model:
    """Load a model for inference from an artifact, a training run or a checkpoint of another library.

    Args:
      path: an artifact folder, the workdir of a run, or a checkpoint: `hf-hub:org/name`, a folder of open_clip or
        transformers, a file of open_clip, or a GGUF file.
      implementation: name of the implementation that multiplies packed ternary weights, one of
        `tclip_jax.ternary.kernels.NAMES`; None selects the preferred one for this device. It has no effect on float
        weights, such as those of a run.
      activations: "A32" multiplies the activations as they are. "A16" and "A8" round each token's activations to int16
        or int8 before each packed product. None is "A16" on CPUs where it is twice as fast as "A32", otherwise "A32".

    Returns:
      A `Model`. Its `encode_image` and `encode_text` return L2-normalised embeddings, float32 (N, embed_dim).

    Raises:
      FileNotFoundError: `path` is not an artifact, a run or a checkpoint.
      ValueError: a file is broken (the message names the file and what was expected), or `implementation` cannot run on
        this device.
    """
    from tclip_jax.inference.load import load_model

    return load_model(path).repacked(implementation=implementation, activations=activations)
