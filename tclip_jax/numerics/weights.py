"""Measure the difference of two arrays, of two recordings, and of two parameter trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import matrix_shape
from tclip_jax.numerics.configurations import Differences, differences, other_shapes
from tclip_jax.numerics.golden import model_recipe
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.taps import Taps
from tclip_jax.ternary import QuantizedTensor, TernaryTensor
from tclip_jax.ternary.tensor import expand_scale

Array = npt.NDArray[Any]

# Bins of the ULP histogram: 0, 1, 2–3, 4–7, … 2³¹ and more.
ULP_BINS = 33


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of an array and a reference of the same shape.

    Attributes:
      name: name of the tap or the parameter.
      size: number of elements.
      nonfinite: number of elements that are NaN or infinite on either side; all other figures omit them.
      max_abs: max |Δ|.
      relative: max of |Δ| / (|reference| + RMS of the reference); budgets apply to this figure. The RMS keeps zeros
        from exaggerating an error; |reference| keeps a few huge activations from exaggerating their own.
      rmse: root mean square of Δ.
      cosine: cosine similarity of both as vectors; 1 if both are 0.
      ulp_50, ulp_99, ulp_max: percentiles and maximum of the distance in float32 units in the last place (ULP).
      ulp_counts: number of elements with a ULP distance of 0, 1, 2–3, 4–7, and so on.
    """

    name: str
    size: int
    nonfinite: int
    max_abs: float
    relative: float
    rmse: float
    cosine: float
    ulp_50: float
    ulp_99: float
    ulp_max: float
    ulp_counts: tuple[int, ...] = dataclasses.field(repr=False)

    def over(self, budget: float) -> bool:
        """Return whether the relative error exceeds the budget, or an element is not finite."""
        return self.nonfinite > 0 or self.relative > budget


def measure(name: str, ours: Array, reference: Array) -> Difference:
    """Compare two float arrays in float64.

    Raises:
      ValueError: the shapes differ.
    """
    if ours.shape != reference.shape:
        raise ValueError(f"{name} has shape {ours.shape}: the reference's is {reference.shape}")
    finite = np.isfinite(ours) & np.isfinite(reference)
    left, right = (np.asarray(array, np.float32)[finite] for array in (ours, reference))
    ulp = ulp_distance(left, right) if left.size else np.zeros(1, np.int64)
    counts = np.bincount(np.frexp(ulp.astype(np.float64))[1], minlength=ULP_BINS)
    a, b = left.astype(np.float64), right.astype(np.float64)
    delta = np.abs(a - b)
    scale = np.abs(b) + _rms(b)
    relative = np.divide(delta, scale, out=np.where(delta > 0, np.inf, 0.0), where=scale > 0)
    lengths = np.sqrt((a @ a) * (b @ b))
    return Difference(
        name=name,
        size=ours.size,
        nonfinite=int(ours.size - finite.sum()),
        max_abs=float(delta.max(initial=0)),
        relative=float(relative.max(initial=0)),
        rmse=_rms(delta),
        cosine=float(a @ b / lengths) if lengths else float(not delta.any()),
        ulp_50=float(np.percentile(ulp, 50)),
        ulp_99=float(np.percentile(ulp, 99)),
        ulp_max=float(ulp.max()),
        ulp_counts=tuple(counts.tolist()),
    )


def ulp_distance(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the distance of b from a in float32 numbers (ULP), elementwise; −0 equals +0."""
    return np.abs(_ordinal(a) - _ordinal(b))


def _ordinal(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _rms(x: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(x**2))) if x.size else 0.0


def compare_taps(ours: Taps, reference: Taps) -> list[Difference]:
    """Measure the difference at every tap, in the order of `ours`.

    Raises:
      ValueError: the models have different taps or shapes; the message names the first such tap.
    """
    for name in [*ours, *reference]:
        if name not in ours or name not in reference:
            raise ValueError(f"only one of the models has {name}: both must have the same number of layers")
    return [measure(name, ours[name], reference[name]) for name in ours]


def first_over(differences: Sequence[Difference], budget: float) -> dict[str, str]:
    """Return the name of the first tap over the budget, by tower; omit towers without such a tap."""
    first: dict[str, str] = {}
    for difference in differences:
        if difference.over(budget):
            first.setdefault(difference.name.split("/")[0], difference.name)
    return first


def end_metrics(ours: Taps, reference: Taps, scales: tuple[float, float]) -> dict[str, float]:
    """Measure the effect on predictions: each image of the batch is classified among the batch's texts.

    Args:
      ours: taps of one model.
      reference: taps of the other model.
      scales: exp(logit_scale) of both models.

    Returns:
      `agreement`, the fraction of images with the same most similar text; `kl_mean` and `kl_max`, in nats, of the KL
      divergence of our distribution over texts from the reference's, KL(reference ‖ ours).
    """
    log_p, log_q = (
        _log_softmax(scale * taps["image/embedding"].astype(np.float64) @ taps["text/embedding"].T)
        for taps, scale in zip((reference, ours), scales[::-1], strict=True)
    )
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    agreement = np.mean(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    return {"agreement": float(agreement), "kl_mean": float(kl.mean()), "kl_max": float(kl.max())}


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class WeightDifference(Difference):
    """The difference of the effective weights of a parameter: scale · trit if it is ternary.

    Attributes:
      trit_flips: number of trits that differ; a float side counts by its signs. None if neither side is ternary.
      scale_error: max |Δ| / reference over the scales of nonzero trits; None unless both sides are ternary.
    """

    trit_flips: int | None = None
    scale_error: float | None = None


@dataclasses.dataclass(frozen=True)
class WeightComparison:
    """Parameters missing from ours, parameters only in ours, and the differences of the common parameters."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    differences: tuple[WeightDifference, ...]


def compare_weights(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> WeightComparison:
    """Compare packed or float parameter trees layer by layer, with names such as 'image/blocks/3/mlp/fc1/kernel'."""
    left, right = (dict(_layers(params)) for params in (ours, reference))
    return WeightComparison(
        missing=tuple(name for name in right if name not in left),
        unexpected=tuple(name for name in left if name not in right),
        differences=tuple(_weight_difference(name, left[name], right[name]) for name in left if name in right),
    )


def _layers(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, leaf in flatten(jax.device_get(params)).items():
        if "/blocks/" in path:
            for i in range(leaf.shape[0]):
                layer = jax.tree.map(lambda stacked, i=i: stacked[i], leaf)
                yield path.replace("/blocks/", f"/blocks/{i}/"), layer
        else:
            # A quantized patch embedding is stored as a matrix.
            yield path, leaf if isinstance(leaf, QuantizedTensor) else leaf.reshape(matrix_shape(leaf.shape))


def _weight_difference(name: str, ours: Any, reference: Any) -> WeightDifference:
    # vars instead of dataclasses.asdict, which would copy the counts.
    difference = vars(measure(name, _values(ours), _values(reference)))
    ternary = [isinstance(leaf, TernaryTensor) for leaf in (ours, reference)]
    return WeightDifference(
        **difference,
        trit_flips=int(np.sum(_trits(ours) != _trits(reference))) if any(ternary) else None,
        scale_error=_scale_error(ours, reference) if all(ternary) else None,
    )


def _values(leaf: Any) -> Any:
    return np.asarray(leaf.dequantize() if isinstance(leaf, QuantizedTensor) else leaf)


def _trits(leaf: Any) -> Any:
    return leaf.trits if isinstance(leaf, TernaryTensor) else np.sign(_values(leaf))


def _scale_error(ours: TernaryTensor, reference: TernaryTensor) -> float:
    used = (ours.trits != 0) & (reference.trits != 0)
    a, b = (
        np.broadcast_to(expand_scale(leaf.scale, leaf.group, leaf.shape[leaf.axis], leaf.axis), leaf.shape)[used]
        for leaf in (ours, reference)
    )
    return float(np.max(np.abs(a - b) / b, initial=0))


def weights_report(
    title: str, ours: Model, reference: Model, budget: float = 0.0, configurations: Differences | None = None
) -> Report:
    """Compare the effective weights of two models; latent weights are quantized by the model's rules first.

    Args:
      title: title of the report.
      ours: the model that is checked.
      reference: the reference.
      budget: the largest relative error that passes.
      configurations: options that the models state differently; None compares all that they have. They are reported
        only: other options may have equal weights.
    """
    if configurations is None:
        configurations = differences(model_recipe(ours), model_recipe(reference))
    if other_shapes(configurations):
        verdict = ["the models have different shapes, so no weight can be compared"]
        return Report(title, {}, {}, budget, tuple(verdict), False, configurations)
    comparison = compare_weights(*(pack_params(model.params, model.rules) for model in (ours, reference)))
    over = [row for row in comparison.differences if row.over(budget)]
    flips = sum(row.trit_flips or 0 for row in comparison.differences)
    result = f"{len(over)} of {len(comparison.differences)} tensors over budget {budget:g}, {flips:,} trit flips"
    verdict = [result]
    for what, names in (("missing", comparison.missing), ("unexpected", comparison.unexpected)):
        verdict += [f"{what}: {', '.join(names)}"] if names else []
    verdict += [f"farthest apart: {max(over, key=lambda row: row.relative).name}"] if over else []
    passed = not (over or comparison.missing or comparison.unexpected)
    tables = {"weights": comparison.differences}
    return Report(title, {}, tables, budget, tuple(verdict), passed, configurations, first_over(over, budget))
