"""Recordings of a model's activations, and golden files, which store a recording to compare with it without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from etils import epath

from tclip_jax.inference.model import Model
from tclip_jax.keys import Recipe, recipe
from tclip_jax.numerics.taps import Taps
from tclip_jax.schema import plain
from tclip_jax.storage import write_atomic

VERSION = "2"
_INPUTS = ("input/pixels", "input/tokens")


class Recording(NamedTuple):
    """The activations of a model on a batch.

    Attributes:
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.
      taps: the activations for these inputs, by name.
      logit_scale: exp of the parameter.
      facts: the library, device and precision that ran the model.
      made_by: configuration and preprocessing of the model, from `model_recipe`; empty if unknown.
    """

    pixels: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    taps: Taps
    logit_scale: float
    facts: Mapping[str, str]
    made_by: Mapping[str, Any] = MappingProxyType({})


def model_recipe(model: Model) -> Recipe:
    """Return the configuration and preprocessing that a model must share with a recording."""
    return recipe(config=model.config, preprocess=model.preprocess)


def write_golden(path: epath.PathLike, recording: Recording) -> None:
    """Write a recording as a safetensors file, local or gs://, with everything but the arrays as JSON in its header."""
    arrays = dict(zip(_INPUTS, (recording.pixels, recording.tokens), strict=True)) | recording.taps
    header = {"logit_scale": recording.logit_scale, "facts": dict(recording.facts), "taps": list(recording.taps)}
    header["made_by"] = dict(recording.made_by)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, safetensors.numpy.save(contiguous, {"tclip_golden": VERSION, "json": json.dumps(header)}))


def read_golden(path: epath.PathLike) -> Recording:
    """Read a golden file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a golden file, has another version, or is damaged.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `tclip compare golden dump` writes one")
    data = path.read_bytes()
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata["tclip_golden"] != VERSION:
            raise ValueError(
                f"its version is {metadata['tclip_golden']!r:.20}, only {VERSION!r} can be read: dump it again"
            )
        header = json.loads(metadata["json"])
        taps = {name: arrays[name] for name in header["taps"]}
        pixels, tokens = (arrays[name] for name in _INPUTS)
        made_by = dict(header["made_by"])
        return Recording(pixels, tokens, taps, float(header["logit_scale"]), dict(header["facts"]), made_by)
    except KeyError as error:
        raise ValueError(f"{path}: not a golden file: it lacks {plain(error)}") from None
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a golden file, or a damaged one: {plain(error, 200)}") from None
