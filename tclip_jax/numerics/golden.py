"""A recording of a model's activations, in memory or as a golden file that needs no PyTorch to be checked."""

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
      tokens: (B, T) int32.
      taps: the activations computed from them.
      logit_scale: exp of the parameter.
      facts: the model, and the libraries and precision that ran it.
      made_by: shape and preprocessing of the model, as of `model_recipe`; empty where they are not known.
    """

    pixels: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    taps: Taps
    logit_scale: float
    facts: Mapping[str, str]
    made_by: Mapping[str, Any] = MappingProxyType({})


def model_recipe(model: Model) -> Recipe:
    """What a golden file says of its model, and a model that is checked with it must have too."""
    return recipe(config=model.config, preprocess=model.preprocess)


def write_golden(path: epath.PathLike, recording: Recording) -> None:
    """Writes one safetensors file, local or gs://; what is not an array is JSON in its header."""
    arrays = dict(zip(_INPUTS, (recording.pixels, recording.tokens), strict=True)) | recording.taps
    header = {"logit_scale": recording.logit_scale, "facts": dict(recording.facts), "taps": list(recording.taps)}
    header["made_by"] = dict(recording.made_by)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomic(path, safetensors.numpy.save(contiguous, {"tclip_golden": VERSION, "json": json.dumps(header)}))


def read_golden(path: epath.PathLike) -> Recording:
    """Reads a golden file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: not a golden file, or a broken one.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `tclip compare golden dump` writes one")
    data = path.read_bytes()
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata["tclip_golden"] != VERSION:
            raise ValueError(f"version {metadata['tclip_golden']!r:.20} where this one reads {VERSION!r}: dump it anew")
        header = json.loads(metadata["json"])
        taps = {name: arrays[name] for name in header["taps"]}
        pixels, tokens = (arrays[name] for name in _INPUTS)
        made_by = dict(header["made_by"])
        return Recording(pixels, tokens, taps, float(header["logit_scale"]), dict(header["facts"]), made_by)
    except KeyError as error:
        raise ValueError(f"{path}: not a golden file: it lacks {plain(error)}") from None
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a golden file, or a broken one: {plain(error, 200)}") from None
