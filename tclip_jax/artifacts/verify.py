"""An artifact compared with the parameters it was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import ArtifactError
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, matrix_shape
from tclip_jax.schema import check_names
from tclip_jax.ternary import TernaryTensor


@dataclasses.dataclass(frozen=True)
class Verification:
    """How many numbers were compared, and a line for each parameter or setting that differs."""

    trits: int
    scales: int
    floats: int
    differences: tuple[str, ...]


def verify_artifact(
    folder: epath.PathLike,
    params: Mapping[str, Any],
    rules: TernaryRules = (),
    *,
    config: CLIPConfig | None = None,
    preprocess: Preprocess | None = None,
) -> Verification:
    """Compares every bit of an artifact with a model: trits, scales, and the rest after the artifact's cast.

    Args:
      folder: the artifact.
      params: latent or packed parameters; where the artifact is ternary and these are float beyond `rules`, as in
        another library's checkpoint, they must be exactly scale · trit.
      rules: which of them are latent weights to make ternary first.
      config, preprocess: those of the model, compared where given.

    Raises:
      ArtifactError: an artifact that cannot be read, or has other parameters than `params`.
    """
    artifact = read_artifact(folder)
    expected, found = flatten(pack_params(params, rules)), flatten(artifact.params)
    check_names(found, expected, f"{folder}: the list of tensors", ArtifactError)
    differences = []
    for name, ours, theirs in (("model", artifact.config, config), ("preprocessing", artifact.preprocess, preprocess)):
        if theirs is not None and ours != theirs:
            differences.append(f"{name} is {ours}: expected {theirs}")
    for path, leaf in expected.items():
        reasons = _reasons(found[path], leaf, artifact.manifest["tensors"][path]["dtype"])
        differences += [f"{path}: {reason}" for reason in reasons]
    ternary = [leaf for leaf in found.values() if isinstance(leaf, TernaryTensor)]
    floats = [leaf for leaf in found.values() if not isinstance(leaf, TernaryTensor)]
    return Verification(
        trits=sum(np.size(leaf.trits) for leaf in ternary),
        scales=sum(np.size(leaf.scale) for leaf in ternary),
        floats=sum(map(np.size, floats)),
        differences=tuple(differences),
    )


def _reasons(found: Any, expected: Any, dtype: str) -> Iterator[str]:
    """What differs in one parameter, in words."""
    if isinstance(found, TernaryTensor) and not isinstance(expected, TernaryTensor):
        expected = np.asarray(expected, np.float32).reshape(matrix_shape(np.shape(expected)))
    if np.shape(found) != np.shape(expected):
        yield f"shape {np.shape(found)}, expected {np.shape(expected)}"
    elif isinstance(found, TernaryTensor) and isinstance(expected, TernaryTensor):
        ours, theirs = ((each.group, each.scale.shape) for each in (found, expected))
        if ours != theirs:
            yield f"groups of {ours[0]}, scales {ours[1]}, expected groups of {theirs[0]}, scales {theirs[1]}"
        else:
            yield from _unequal("scales", _bits(found.scale) != _bits(expected.scale))
        yield from _unequal("trits", np.asarray(found.trits) != np.asarray(expected.trits))
    elif isinstance(found, TernaryTensor):
        # By value: the zeros of another library may be −0.
        yield from _unequal("weights", np.asarray(found.dequantize()) != expected)
    elif isinstance(expected, TernaryTensor):
        yield "float, expected trits"
    else:
        with np.errstate(over="ignore"):
            cast = np.asarray(expected, np.float32).astype(dtype)
        yield from _unequal(f"values as {dtype}", _bits(found) != _bits(cast))


def _unequal(what: str, different: npt.NDArray[np.bool_]) -> Iterator[str]:
    if count := int(np.count_nonzero(different)):
        first = tuple(int(index[0]) for index in np.nonzero(np.atleast_1d(different)))
        yield f"{count:,} of {different.size:,} {what} differ, the first at {first}"


def _bits(array: Any) -> npt.NDArray[np.uint32]:
    """float32 as it is stored: −0 and +0 differ, and every NaN equals itself."""
    return np.asarray(array, np.float32).view(np.uint32)
