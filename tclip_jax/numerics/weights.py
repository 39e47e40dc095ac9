"""How far two arrays are apart, and two parameter trees, tensor by tensor and layer by layer."""

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
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.taps import Taps
from tclip_jax.ternary import TernaryTensor
from tclip_jax.ternary.tensor import expand_scale

Array = npt.NDArray[Any]

# Bins of the ULP histogram: 0, 1, 2–3, 4–7, … 2³¹ and more.
ULP_BINS = 33


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an array is from a reference of the same shape.

    Attributes:
      name: of the tap or the parameter.
      size: number of elements.
      nonfinite: elements that are NaN or infinite on either side; all other figures leave them out.
      max_abs: max |Δ|.
      relative: max of |Δ| / (|reference| + RMS of the reference), the figure that budgets are for. It weighs an element
        by its own size or the tensor's, whichever is larger, so that neither zeros nor a few huge activations hide or
        exaggerate an error.
      rmse: root of the mean Δ².
      cosine: between both as vectors; 1 where both are 0.
      ulp_50, ulp_99, ulp_max: percentiles of the float32 numbers between the two.
      ulp_counts: elements with 0, 1, 2–3, 4–7, … such numbers between.
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
        """Whether the relative error is above the budget, or anything is not finite."""
        return self.nonfinite > 0 or self.relative > budget


def measure(name: str, ours: Array, reference: Array) -> Difference:
    """Compares two float arrays in float64.

    Raises:
      ValueError: different shapes.
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
    """How many float32 numbers b is away from a; −0 and +0 are the same number."""
    return np.abs(_ordinal(a) - _ordinal(b))


def _ordinal(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    bits = np.ascontiguousarray(x).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _rms(x: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(x**2))) if x.size else 0.0


def compare_taps(ours: Taps, reference: Taps) -> list[Difference]:
    """The difference at every tap, in the order of the computation.

    Raises:
      ValueError: models of different shapes, naming the first tap that does not fit.
    """
    for name in [*ours, *reference]:
        if name not in ours or name not in reference:
            raise ValueError(f"only one of the models has {name}: they must have equally many layers")
    return [measure(name, ours[name], reference[name]) for name in ours]


def first_over(differences: Sequence[Difference], budget: float) -> dict[str, str]:
    """The first tap over budget of each tower that has one: tower -> name."""
    first: dict[str, str] = {}
    for difference in differences:
        if difference.over(budget):
            first.setdefault(difference.name.split("/")[0], difference.name)
    return first


def end_metrics(ours: Taps, reference: Taps, scales: tuple[float, float]) -> dict[str, float]:
    """What differences do to the answer: each image of the batch classified among the batch's texts.

    Args:
      ours: taps of one model.
      reference: those of the other.
      scales: exp(logit_scale) of both.

    Returns:
      agreement (share of images, 0–1, with the same most similar text), kl_mean and kl_max (of the reference's
      distribution over texts from ours, in nats).
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
