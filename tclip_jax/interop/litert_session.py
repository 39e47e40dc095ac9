"""Run the towers of a LiteRT export with ai-edge-litert, on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from packaging.version import Version

# Older ones ignore the scales of blocks without a word: 1.3 in look-ups, 1.2 also in products.
OLDEST = "1.4.0"


def runtime_version() -> str | None:
    """Return the version of the installed ai-edge-litert; None if there is none.

    Raises:
      ValueError: it is too old for INT4 weights in blocks.
    """
    if not importlib.util.find_spec("ai_edge_litert"):
        return None
    version = importlib.metadata.version("ai-edge-litert")
    if Version(version) < Version(OLDEST):
        raise ValueError(f"ai-edge-litert {version} ignores the scales of INT4 blocks: install {OLDEST} or newer")
    return version


def run_litert(file: bytes, inputs: npt.NDArray[Any], outputs: Sequence[int] = ()) -> list[npt.NDArray[np.float32]]:
    """Run a tower on a batch of any size, in parts of the size that the file has.

    Args:
      file: the content of a .tflite file with one input.
      inputs: normalised pixels (B, H, W, 3) float32, or token ids (B, T) int32.
      outputs: indices of the output tensors; empty for all.

    Returns:
      The outputs, float32 (B, T, D); T is 1 unless the file has several rows for an input, such as its tokens.

    Raises:
      ValueError: ai-edge-litert is not installed, or cannot run the file.
    """
    version = runtime_version()
    if version is None:
        raise ValueError("LiteRT files run in ai-edge-litert: pip install 'tclip-jax[litert]'")
    interpreter = importlib.import_module("ai_edge_litert.interpreter")
    try:
        session = interpreter.Interpreter(model_content=file, num_threads=os.cpu_count())
        session.allocate_tensors()
        (entry,) = session.get_input_details()
        size = int(entry["shape"][0])
        parts: list[list[npt.NDArray[np.float32]]] = []
        for start in range(0, len(inputs), size):
            part = np.zeros((size, *inputs.shape[1:]), inputs.dtype)
            part[: len(inputs) - start] = inputs[start : start + size]
            session.set_tensor(entry["index"], part)
            session.invoke()
            wanted = outputs or [each["index"] for each in session.get_output_details()]
            values = [session.get_tensor(index) for index in wanted]
            parts.append([value.reshape(size, -1, value.shape[-1]) for value in values])
        return [np.concatenate(each)[: len(inputs)] for each in zip(*parts, strict=True)]
    # The errors of LiteRT have no common base but Exception.
    except Exception as error:
        raise ValueError(f"ai-edge-litert {version}: {' '.join(str(error).split())[:200]}") from None
