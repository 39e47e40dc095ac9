"""TernaryCLIP (arXiv 2510.21879) in JAX: training by distillation, packed inference, PyTorch export.

model = tclip_jax.load("runs/quickstart/artifact")
model.encode_text(["a photo of a cat"])
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from etils import epath

    from tclip_jax.artifacts.model import Model

__version__ = importlib.metadata.version("tclip-jax")
__all__ = ["__version__", "load"]


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
    from tclip_jax.training.restore import load_model

    return load_model(path).repacked(implementation=implementation, activations=activations)
