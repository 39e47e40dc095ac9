"""Compare an artifact with the parameters from which it was made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from etils import epath

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.manifest import ArtifactError
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.keys import difference
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import TernaryRules, matrix_shape
from tclip_jax.schema import check_names
from tclip_jax.ternary import QuantizedTensor, TernaryTensor, UniformTensor


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of `verify_artifact`.

    Attributes:
      trits: number of trits compared.
      integers: number of integers of 4 and 8 bits compared.
      scales: number of scales compared.
      floats: number of other values compared.
      differences: one line for each parameter or setting that differs.
    """

    trits: int
    integers: int
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
    """Compare every bit of an artifact with a model: trits, integers, scales, and floats in the artifact's dtype.

    Args:
      folder: the artifact.
      params: latent or packed parameters. Floats that no rule matches, but that are quantized in the artifact, must
        equal scale · trit or scale · integer; checkpoints of other libraries have such floats.
      rules: the quantizers of latent weights before the comparison.
      config: the model's shape, to compare if given.
      preprocess: its preprocessing, to compare if given.

    Raises:
      ArtifactError: the artifact cannot be read, or its list of parameters differs from that of `params`.
    """
    artifact = read_artifact(folder)
    expected, actual = flatten(pack_params(params, rules)), flatten(artifact.params)
    check_names(actual, expected, f"{folder}: the list of tensors", ArtifactError)
    differences = []
    for name, value, wanted in (("model", artifact.config, config), ("preprocessing", artifact.preprocess, preprocess)):
        if wanted is not None and value != wanted:
            differences.append(f"{name}: {difference(dataclasses.asdict(value), dataclasses.asdict(wanted))}")
    if config is not None and config != artifact.config:
        # The difference of the models explains parameters of another size.
        same = [path for path in actual if math.prod(actual[path].shape) == math.prod(np.shape(expected[path]))]
        actual = {path: actual[path] for path in same}
    for path in actual:
        leaf = expected[path]
        reasons = _reasons(actual[path], leaf, artifact.manifest["tensors"][path]["dtype"])
        differences += [f"{path}: {reason}" for reason in reasons]
    quantized = [leaf for leaf in actual.values() if isinstance(leaf, QuantizedTensor)]
    trits, integers = (
        sum(math.prod(leaf.shape) for leaf in quantized if isinstance(leaf, kind))
        for kind in (TernaryTensor, UniformTensor)
    )
    return Verification(
        trits=trits,
        integers=integers,
        scales=sum(np.size(leaf.scale) for leaf in quantized),
        floats=sum(np.size(leaf) for leaf in actual.values() if not isinstance(leaf, QuantizedTensor)),
        differences=tuple(differences),
    )


def _reasons(actual: Any, expected: Any, dtype: str) -> Iterator[str]:
    """Yield a description of each difference in one parameter."""
    if isinstance(actual, QuantizedTensor) and not isinstance(expected, QuantizedTensor):
        expected = np.asarray(expected, np.float32).reshape(matrix_shape(np.shape(expected)))
    if np.shape(actual) != np.shape(expected):
        yield f"shape {np.shape(actual)}, expected {np.shape(expected)}"
    elif isinstance(expected, QuantizedTensor) and _held(actual) != _held(expected):
        yield f"{_held(actual)}, expected {_held(expected)}"
    elif isinstance(actual, QuantizedTensor) and isinstance(expected, QuantizedTensor):
        layout, wanted = ((leaf.group, leaf.scale.shape) for leaf in (actual, expected))
        if layout != wanted:
            yield f"groups of {layout[0]}, scales {layout[1]}, expected groups of {wanted[0]}, scales {wanted[1]}"
        else:
            yield from _unequal("scales", _bits(actual.scale) != _bits(expected.scale))
        what = "trits" if isinstance(actual, TernaryTensor) else "integers"
        yield from _unequal(what, np.asarray(actual.integers) != np.asarray(expected.integers))
    elif isinstance(actual, QuantizedTensor):
        # Compare values, not bits: another library may store −0 for a zero.
        yield from _unequal("weights", np.asarray(actual.dequantize()) != expected)
    else:
        with np.errstate(over="ignore"):
            cast = np.asarray(expected, np.float32).astype(dtype)
        yield from _unequal(f"values as {dtype}", _bits(actual) != _bits(cast))


def _held(leaf: Any) -> str:
    """What a parameter holds, in a word or two."""
    if isinstance(leaf, UniformTensor):
        return f"integers of {leaf.bits} bits"
    return "trits" if isinstance(leaf, TernaryTensor) else "float"


def _unequal(what: str, different: npt.NDArray[np.bool_]) -> Iterator[str]:
    if count := int(np.count_nonzero(different)):
        first = tuple(int(index[0]) for index in np.nonzero(np.atleast_1d(different)))
        yield f"{count:,} of {different.size:,} {what} differ, the first at {first}"


def _bits(array: Any) -> npt.NDArray[np.uint32]:
    """View float32 values as uint32: −0 differs from +0, and a NaN equals itself."""
    return np.asarray(array, np.float32).view(np.uint32)
