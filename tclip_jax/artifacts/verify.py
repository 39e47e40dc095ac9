"""An artifact compared with the parameters it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import ArtifactError, check_names
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.models.ternary_rules import TernaryRules
from tclip_jax.ternary import TernaryTensor


def verify_artifact(folder: epath.PathLike, params: Mapping[str, Any], rules: TernaryRules) -> None:
    """Compares every bit of an artifact with parameters, latent or packed: trits, scales, and the rest after its cast.

    Raises:
      ArtifactError: an artifact that cannot be read, or the first parameter that differs.
    """
    artifact = read_artifact(folder)
    expected, found = flatten(pack_params(params, rules)), flatten(artifact.params)
    check_names(found, expected, f"{folder}: tensors")
    for path, leaf in expected.items():
        if not _same(found[path], leaf, artifact.manifest["tensors"][path]["dtype"]):
            raise ArtifactError(f"{folder}: {path} is not what the given parameters pack to")


def _same(found: Any, expected: Any, dtype: str) -> bool:
    if isinstance(found, TernaryTensor) and isinstance(expected, TernaryTensor):
        return (
            (found.group, found.axis) == (expected.group, expected.axis)
            and np.array_equal(found.trits, expected.trits)
            and _same_bits(found.scale, expected.scale)
        )
    if isinstance(found, TernaryTensor) or isinstance(expected, TernaryTensor):
        return False
    with np.errstate(over="ignore"):
        return _same_bits(found, np.asarray(expected, np.float32).astype(dtype))


def _same_bits(found: Any, expected: Any) -> bool:
    """Whether two arrays are equal in float32, −0 and +0 being different."""
    found, expected = (np.asarray(array, np.float32).view(np.uint32) for array in (found, expected))
    return np.array_equal(found, expected)
