"""Two parameter trees, tensor by tensor and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tclip_jax.artifacts.model import Model
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.models.ternary_rules import matrix_shape
from tclip_jax.numerics.compare import Difference, measure
from tclip_jax.numerics.report import Report
from tclip_jax.ternary import TernaryTensor
from tclip_jax.ternary.tensor import expand_scale


@dataclasses.dataclass(frozen=True)
class WeightDifference(Difference):
    """A `Difference` of the weights that the model computes with, which are scale · trit where they are ternary.

    Attributes:
      trit_flips: trits that differ; None where neither side is ternary. Of a float side they are the signs.
      scale_error: max |Δ| / reference over the scales of nonzero trits; None unless both sides are ternary.
    """

    trit_flips: int | None = None
    scale_error: float | None = None


@dataclasses.dataclass(frozen=True)
class WeightComparison:
    """Parameters in only one of two trees (missing in ours, unexpected in ours), and the differences of the others."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differences: tuple[WeightDifference, ...]


def compare_weights(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> WeightComparison:
    """Compares packed or float parameter trees; stacked tensors layer by layer, as 'image/blocks/3/mlp/fc1/kernel'."""
    left, right = (dict(_layers(params)) for params in (ours, reference))
    return WeightComparison(
        missing=tuple(name for name in right if name not in left),
        unexpected=tuple(name for name in left if name not in right),
        differences=tuple(_compare(name, left[name], right[name]) for name in left if name in right),
    )


def _layers(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, leaf in flatten(jax.device_get(params)).items():
        if "/blocks/" in path:
            for i in range(leaf.shape[0]):
                layer = jax.tree.map(lambda stacked, i=i: stacked[i], leaf)
                yield path.replace("/blocks/", f"/blocks/{i}/"), layer
        else:
            # The patch embedding is a matrix where it is ternary.
            yield path, leaf if isinstance(leaf, TernaryTensor) else leaf.reshape(matrix_shape(leaf.shape))


def _compare(name: str, ours: Any, reference: Any) -> WeightDifference:
    # vars, and not dataclasses.asdict, which would copy the counts.
    difference = vars(measure(name, _values(ours), _values(reference)))
    ternary = [isinstance(leaf, TernaryTensor) for leaf in (ours, reference)]
    return WeightDifference(
        **difference,
        trit_flips=int(np.sum(_trits(ours) != _trits(reference))) if any(ternary) else None,
        scale_error=_scale_error(ours, reference) if all(ternary) else None,
    )


def _values(leaf: Any) -> Any:
    return np.asarray(leaf.dequantize() if isinstance(leaf, TernaryTensor) else leaf)


def _trits(leaf: Any) -> Any:
    return leaf.trits if isinstance(leaf, TernaryTensor) else np.sign(leaf)


def _scale_error(ours: TernaryTensor, reference: TernaryTensor) -> float:
    used = (ours.trits != 0) & (reference.trits != 0)
    a, b = (
        np.broadcast_to(expand_scale(leaf.scale, leaf.group, leaf.shape[leaf.axis], leaf.axis), leaf.shape)[used]
        for leaf in (ours, reference)
    )
    return float(np.max(np.abs(a - b) / b, initial=0))


def weights_report(title: str, ours: Model, reference: Model, budget: float = 0.0) -> Report:
    """Compares the weights that two models compute with; latent ones as their rules make them."""
    found = compare_weights(*(pack_params(model.params, model.rules) for model in (ours, reference)))
    over = [row for row in found.differences if row.over(budget)]
    flips = sum(row.trit_flips or 0 for row in found.differences)
    verdict = [f"{len(over)} of {len(found.differences)} tensors over budget {budget:g}, {flips:,} trit flips"]
    for what, names in (("missing", found.missing), ("unexpected", found.unexpected)):
        verdict += [f"{what}: {', '.join(names)}"] if names else []
    verdict += [f"farthest apart: {max(over, key=lambda row: row.relative).name}"] if over else []
    passed = not (over or found.missing or found.unexpected)
    return Report(title, {}, {"weights": found.differences}, budget, tuple(verdict), passed)
