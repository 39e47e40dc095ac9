"""Run the towers of an ONNX export in ONNX Runtime, on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from packaging.version import Version

# The first with a 2-bit product on CPUs: with AVX-512; with AVX2 it is 1.29. Others silently expand the weights to
# floats.
OLDEST = "1.28.0"
_ERRORS_ONLY = 3


def runtime_version(*, packed: bool = True) -> str | None:
    """Return the version of the installed ONNX Runtime; None if there is none.

    Args:
      packed: whether it must multiply 2-bit weights.

    Raises:
      ValueError: it is too old for that.
    """
    if not importlib.util.find_spec("onnxruntime"):
        return None
    version = str(importlib.import_module("onnxruntime").__version__)
    if packed and Version(version) < Version(OLDEST):
        raise ValueError(
            f"onnxruntime {version} has no product with 2-bit weights and would expand them to floats: install {OLDEST}"
            " or newer"
        )
    return version


def run_onnx(
    file: bytes, tower: str, inputs: npt.NDArray[Any], outputs: Sequence[str]
) -> list[npt.NDArray[np.float32]]:
    """Run a tower.

    Args:
      file: the content of an ONNX file.
      tower: "image" or "text".
      inputs: normalised pixels (B, H, W, 3) float32, or token ids (B, T).
      outputs: names of outputs.

    Returns:
      The outputs, float32.

    Raises:
      ValueError: ONNX Runtime is not installed, or cannot run the file.
    """
    if not importlib.util.find_spec("onnxruntime"):
        raise ValueError("ONNX files run in onnxruntime: pip install 'tclip-jax[onnx]'")
    runtime: Any = importlib.import_module("onnxruntime")
    if tower == "image":
        feed = {"pixel_values": np.ascontiguousarray(np.transpose(inputs, (0, 3, 1, 2)), np.float32)}
    else:
        feed = {"input_ids": np.asarray(inputs, np.int64), "attention_mask": np.ones(np.shape(inputs), np.int64)}
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return session.run(list(outputs), feed)
    # The errors of ONNX Runtime have no common base but Exception.
    except Exception as error:
        raise ValueError(f"onnxruntime {runtime.__version__}: {' '.join(str(error).split())[:200]}") from None
