"""TernaryCLIP (arXiv 2510.21879) in JAX: training by distillation, packed inference, PyTorch export.

model = tclip_jax.load("runs/quickstart/artifact")
model.encode_text(["a photo of a cat"])
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

# Imported when asked for, so that `tclip --help` imports no JAX.
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
    path: epath.PathLike, *, implementation: str | None = None, activations: Literal["A16", "A8"] = "A16"
) -> Model:
    """The model of an artifact or of a training run: `encode_image`, `encode_text`.

    Args:
      path: folder of an artifact, workdir of a run, or another library's checkpoint.
      implementation: of the ternary product of an artifact; None: the best for this device.
      activations: "A8" rounds activations to int8 at each ternary product; "A16" leaves them as they are.

    Raises:
      FileNotFoundError: `path` is neither.
      ValueError: it is broken; one line naming the file and what was expected.
    """
    from tclip_jax.inference.load import load_model

    return load_model(path).repacked(implementation=implementation, activations=activations)
