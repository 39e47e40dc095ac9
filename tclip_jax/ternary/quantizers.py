"""Quantization of float weights to integers and scales. The kinds of quantizers are in kinds.py and in plug-ins.

Results are bit-identical under jit, eager execution, scan and sharding, and in NumPy. To that end sums have a fixed
order, no result depends on how a division is rounded, and scales have few significant bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.registry import Registry
from tclip_jax.schema import check_keys, check_values, key
from tclip_jax.ternary.sums import each_group, halving_sum, split_groups
from tclip_jax.ternary.tensor import TernaryTensor, check_floating, expand_scale
from tclip_jax.ternary.uniform import UniformTensor, largest_integer, pack_uniform, round_to_integers

LevelsRule = Callable[..., tuple[jax.Array, jax.Array | None]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of quantizer, an entry of `QUANTIZERS`.

    Attributes:
      levels: (w, quantizer, axis) -> (raw scale, threshold). `w` is float (..., K, N). The raw scale is float32 in the
        shape of `TernaryTensor.scale`: 0 or more, and 0 only for a group of zeros; `find_levels` rounds it to
        `quantizer.scale_bits`. The threshold has the shape of the scale, or that of `w` for one per weight; None is
        half the rounded scale. Groups are independent of each other.
      gradient: (g, w, scale, threshold, quantizer, axis, size) -> gradient of `w`, in float32. `g` is the gradient of
        ŵ; scale and threshold broadcast to `w`; `size` is the number of weights of the whole matrix. With
        `initial_alpha` it returns a pair, the second being the gradient of α. None is the straight-through gradient g.
      initial_alpha: (w, quantizer, axis) -> α, float32 in the shape of the scales, a learned parameter. `levels` then
        gets it as keyword `alpha`, and its raw scale may have any sign.
      random: `levels` gets a PRNG key as keyword `key`, another one for every weight and step; None in packing,
        evaluation and snapshots, where the kind must be deterministic.
      options: the options of the kind, by name, and their defaults; see `Quantizer.option`.
      uniform: weights are rounded to integers of `quantizer.bits` bits, not to trits. The threshold must be None.
    """

    levels: LevelsRule
    gradient: Callable[..., Any] | None = None
    initial_alpha: Callable[[jax.Array, Quantizer, int], jax.Array] | None = None
    random: bool = False
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.initial_alpha and not self.gradient:
            raise ValueError("a kind of quantizer with a learned scale needs a gradient")


QUANTIZERS: Registry[Kind] = Registry("quantizer")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A quantizer: ŵ = s · t with trits t = sign(w) · (|w| > Δ), or of kind "uniform" ŵ = s · q with integers q.

    A group of weights shares the scale s and the threshold Δ. Below, m is the mean of |w| over the group.

    | kind | s, Δ | source |
    |---|---|---|
    | factor | s = k · m, Δ = s/2; TernaryCLIP k = 2, BitNet b1.58 k = 1 | arXiv 2510.21879 (EdgeRazor), 2402.17764 |
    | twn | Δ = 0.7 · m, s = mean of the magnitudes above Δ | TWN, arXiv 1605.04711 |
    | least_squares | s = argmin Σ (w − ŵ)², found by sorting; Δ = s/2 | the optimum that twn approximates |
    | lsq | s = α, learned, starts at 2 · m; Δ = s/2 | LSQ, arXiv 1902.08153 |
    | seq | s = 2/3 · α, α learned, starts at the largest magnitude; Δ = s/2 = α/3 | ParetoQ, arXiv 2502.02631 |
    | sherry | of 4 consecutive weights, all but the smallest are nonzero; s = their mean magnitude | arXiv 2601.07892 |
    | uniform | s = the largest magnitude / Q, q = w / s rounded, −Q … Q, Q = 2^(bits − 1) − 1 | arXiv 2106.08295 |

    Plug-ins register other kinds, see `tclip_jax.plugins.quantizer`.

    Attributes:
      factor: k of kind "factor".
      group: number of consecutive weights along the input axis that share a scale; "channel" for one scale per output;
        "tensor" for one scale per matrix.
      scale_bits: significant bits of a scale. 8 bits are exact in float16, bfloat16 and float32, 11 bits in float16 and
        float32, 24 bits in float32.
      kind: the rule for scale and threshold, a name in `QUANTIZERS`. It is checked at its first use, because the record
        of an artifact may name a kind of a plug-in that is not installed.
      bits: bits of an integer of kind "uniform".
      options: values of the options that the kind of a plug-in declares: a mapping or pairs, kept as sorted pairs.
      dead_zone_bias: λ of `dead_zone_bias` (Tequila), for layers with a bias; not of uniform and random kinds.

    Raises:
      ValueError: a value is outside its range, or the kind has no dead zone that is the same in every step.
    """

    factor: float = key(2.0, 'k of kind "factor": TernaryCLIP 2, BitNet b1.58 1', gt=0)
    group: int | Literal["channel", "tensor"] = key(256, "weights of the input axis that share a scale", ge=1)
    scale_bits: Literal[8, 11, 24] = key(8, "significant bits of a scale")
    kind: str = key(
        "factor", "rule for scale and threshold: factor, twn, least_squares, lsq, seq, sherry, uniform, or a plug-in's"
    )
    options: Mapping[str, float] | tuple[tuple[str, float], ...] = key(
        (), "values of the options that a plug-in's kind declares, by name", written={}
    )
    bits: Literal[4, 8] = key(8, 'bits of a weight of kind "uniform", −7 … 7 or −127 … 127 times the scale')
    dead_zone_bias: float = key(
        0.0, "λ: a layer's bias gains λ times the sum of each output's weights whose trit is 0 (Tequila)", ge=0
    )

    def __post_init__(self) -> None:
        check_values(Quantizer, vars(self), "quantizer")
        if not self.kind.isidentifier():
            raise ValueError(f"quantizer.kind is {self.kind!r:.80}: it must be a name")
        options = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((name, value) for name, value in options)))
        check_values(Quantizer, {"options": self.options}, "quantizer")  # numbers in pairs are finite
        if self.dead_zone_bias and self.kind in QUANTIZERS:
            _ = self.rule

    @property
    def rule(self) -> Kind:
        """The kind's entry in `QUANTIZERS`.

        Raises:
          ValueError: there is no such kind, it has no such option, or it takes no `dead_zone_bias`.
        """
        rule = QUANTIZERS.find(self.kind, "quantizer.kind")
        check_keys(dict(self.options), rule.options, f"quantizer.options of kind {self.kind}")
        if self.dead_zone_bias and (rule.uniform or rule.random):
            why = f"the kind {self.kind} {'has no trits' if rule.uniform else 'draws its trits at random'}"
            raise ValueError(f"quantizer.dead_zone_bias is {self.dead_zone_bias:g}, but {why}: set it to 0.0")
        return rule

    def option(self, name: str) -> float:
        """Return the value of an option of the kind, or its default."""
        return (dict(self.rule.options) | dict(self.options))[name]

    @property
    def smallest_scale(self) -> float:
        """The smallest scale above 0: 2⁻¹⁷ for 8 bits, 2⁻¹⁴ for 11 and 24 bits.

        It is the least scale that float16 holds with all of its (at most 11) bits.
        """
        return 2.0 ** (min(self.scale_bits, 11) - 25)

    @property
    def learned(self) -> bool:
        """Whether the scale is computed from a learned parameter α instead of the weight."""
        return self.rule.initial_alpha is not None

    @property
    def uniform(self) -> bool:
        """Whether weights become integers of `bits` bits, not trits."""
        return self.rule.uniform

    @property
    def threshold_per_weight(self) -> bool:
        """Whether every weight has its own threshold, as in sherry, instead of every group."""
        if self.uniform or self.learned:
            return False
        alone = dataclasses.replace(self, group="channel")  # in groups of one weight both would have one shape
        levels = jax.eval_shape(lambda w: find_levels(w, alone), jax.ShapeDtypeStruct((8, 1), jnp.float32))
        return levels.threshold.shape != levels.scale.shape

    @property
    def stored_bits(self) -> int:
        """Bits of a packed weight: 2 for a trit, otherwise `bits`."""
        return self.bits if self.uniform else 2

    @property
    def description(self) -> str:
        """Short text for tables, such as "k=2 group=256", "lsq group=channel" or "uniform bits=4 group=128"."""
        options = "".join(f" {name}={value:g}" for name, value in dict(self.options).items())
        kind = {"factor": f"k={self.factor:g}", "uniform": f"uniform bits={self.bits}"}.get(self.kind, self.kind)
        bias = f" dead_zone_bias={self.dead_zone_bias:g}" if self.dead_zone_bias else ""
        return f"{kind}{options} group={self.group}{bias}"

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON, without `options`, `bits` and `dead_zone_bias` if they have their defaults."""
        values = dataclasses.asdict(self) | {"options": dict(self.options)}
        defaults = {"options": {}, "bits": 8, "dead_zone_bias": 0.0}
        return {name: value for name, value in values.items() if name not in defaults or defaults[name] != value}


class Levels(NamedTuple):
    """Scales and thresholds of the groups of a weight.

    Attributes:
      scale: s, float32 in the shape of `TernaryTensor.scale`.
      threshold: Δ, float32 in the same shape, or in the shape of the weight.
      group: number of weights along the input axis that share them.
    """

    scale: jax.Array
    threshold: jax.Array
    group: int

    def expanded(self, length: int, axis: int) -> tuple[jax.Array, jax.Array]:
        """Return scale and threshold broadcastable to a weight with `length` inputs along `axis`."""
        scale = expand_scale(self.scale, self.group, length, axis)
        if self.threshold.shape[axis] == length:
            return scale, self.threshold
        return scale, expand_scale(self.threshold, self.group, length, axis)


def find_levels(
    w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None, key: jax.Array | None = None
) -> Levels:
    """Compute the scale and the threshold of each group of weights.

    Args:
      w: floats (..., K, N).
      quantizer: kind, group size and significant bits.
      axis: the input axis, −1 or −2.
      alpha: the learned α of the kinds that learn their scale, float32 in the shape of the scales.
      key: PRNG key of the kinds that draw random numbers; None makes them deterministic.

    Returns:
      The levels. A scale that is not learned is +0 for a group of zeros, and NaN or
      infinity for a group with NaN or infinity. All others are at least `quantizer.smallest_scale`.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: the kind is unknown, `alpha` is None and the kind learns its scale, or a plug-in's scale or threshold
        has another shape than it must have, or its uniform kind has a threshold.
    """
    check_floating("the weight", w.dtype)
    rule, group = quantizer.rule, group_size(w.shape, quantizer, axis)
    if rule.initial_alpha and alpha is None:
        raise ValueError(f"the quantizer {quantizer.kind} needs its learned scale: pass alpha")
    inputs = {"alpha": alpha} if rule.initial_alpha else {}
    try:
        scale, threshold = rule.levels(w, quantizer, axis, **inputs, **({"key": key} if rule.random else {}))
    except (TypeError, ValueError) as error:
        if not (plugin := QUANTIZERS.plugin(quantizer.kind)):
            raise
        expected = "(w, quantizer, axis) -> (scale, threshold), with the keyword key if random, alpha if learned"
        raise ValueError(f"{plugin['file']}: the quantizer {quantizer.kind}: {error}; it must be {expected}") from error
    shape = scale_shape(w.shape, quantizer, axis)
    if scale.shape != shape or (threshold is not None and threshold.shape not in (shape, w.shape)):
        thresholds = None if threshold is None else threshold.shape
        raise ValueError(
            f"the quantizer {quantizer.kind} gives scales {scale.shape} and thresholds {thresholds} for a weight"
            f" {w.shape}: scales must be {shape}, thresholds that or {w.shape}"
        )
    if rule.uniform and threshold is not None:
        raise ValueError(f"the quantizer {quantizer.kind} is uniform and gives thresholds: they must be None")
    rounded = _rounded(scale.astype(jnp.float32), quantizer)
    if not rule.initial_alpha:
        rounded = jnp.where(scale == 0, 0.0, rounded)
    return Levels(rounded, rounded * 0.5 if threshold is None else threshold.astype(jnp.float32), group)


def initial_alpha(w: jax.Array, quantizer: Quantizer, axis: int = -2) -> jax.Array:
    """Compute the initial value of the learned α: 2 · mean|w| for lsq, max|w| for seq.

    Args:
      w: floats (..., K, N).
      quantizer: of a kind that learns its scale.
      axis: the input axis, −1 or −2.

    Returns:
      float32 in the shape of `TernaryTensor.scale`.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: the kind is unknown, or does not learn its scale.
    """
    check_floating("the weight", w.dtype)
    initial = quantizer.rule.initial_alpha
    if initial is None:
        raise ValueError(f"the quantizer {quantizer.kind} has no learned scale")
    return initial(w, quantizer, axis)


def ternarize(
    w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None, key: jax.Array | None = None
) -> TernaryTensor:
    """Quantize latent weights to trits and scales: t = sign(w) · (|w| > Δ), with s and Δ as in `Quantizer`.

    Args:
      w: floats (..., K, N); (V, W) for an embedding table.
      quantizer: kind, group size and significant bits; of a ternary kind.
      axis: the input axis: −2 for a kernel, −1 for an embedding table.
      alpha: the learned α of the kinds that learn their scale, float32 in the shape of the scales.
      key: PRNG key of the kinds that draw random numbers; None makes them deterministic.

    Returns:
      Trits int8 in the shape of `w`, and float32 scales.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: as `find_levels`, or the kind is uniform.
    """
    if quantizer.uniform:
        raise ValueError(f"the quantizer {quantizer.description} gives no trits: use tclip_jax.ternary.quantize")
    trits, levels = find_integers(w, quantizer, axis, alpha, key)
    return TernaryTensor(trits, levels.scale, levels.group, axis)


def find_integers(
    w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, Levels]:
    """Compute the integers of weights, int8: trits, or those of a uniform kind. The arguments are `ternarize`'s."""
    levels = find_levels(w, quantizer, axis, alpha, key)
    scale, threshold = levels.expanded(w.shape[axis], axis)
    if quantizer.uniform:
        return round_to_integers(w, scale, largest_integer(quantizer.bits)).astype(jnp.int8), levels
    w = w.astype(jnp.float32)
    return (w > threshold).astype(jnp.int8) - (w < -threshold).astype(jnp.int8), levels


def quantize(
    w: jax.Array, quantizer: Quantizer, axis: int = -2, alpha: jax.Array | None = None, key: jax.Array | None = None
) -> TernaryTensor | UniformTensor:
    """Quantize latent weights with any kind: `ternarize`, or for a uniform kind integers q = w / s, rounded.

    Args:
      w: as in `ternarize`.
      quantizer: kind, group size, significant bits, and bits of a uniform kind.
      axis: as in `ternarize`.
      alpha: as in `ternarize`.
      key: as in `ternarize`.

    Returns:
      Trits, or packed integers, and float32 scales.

    Raises:
      TypeError: the weights are integers or bools.
      ValueError: as `find_levels`.
    """
    if not quantizer.uniform:
        return ternarize(w, quantizer, axis, alpha, key)
    integers, levels = find_integers(w, quantizer, axis, alpha, key)
    return pack_uniform(integers, levels.scale, quantizer.bits, levels.group, axis)


def group_size(shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> int:
    """Number of consecutive weights along the input axis that share a scale."""
    return shape[axis] if isinstance(quantizer.group, str) else min(quantizer.group, shape[axis])


def scale_shape(shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> tuple[int, ...]:
    """Shape of the scales of a weight with this shape."""
    axis %= len(shape)
    if quantizer.group == "tensor":
        return (*shape[:-2], 1, 1)
    return (*shape[:axis], -(-shape[axis] // group_size(shape, quantizer, axis)), *shape[axis + 1 :])


def group_totals(x: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """Sum `x` (..., K, N) over the weights that share a scale, in a fixed order, to the shape of the scales."""
    if quantizer.group == "tensor":
        return halving_sum(halving_sum(x, axis), -3 - axis)
    axis, group = axis % x.ndim, group_size(x.shape, quantizer, axis)
    if axis < x.ndim - 1:
        return halving_sum(split_groups(x, group, axis), axis + 1).squeeze(axis + 1)
    # One group after another: XLA for TPUs may store (V, 2, 256) with the 2 as its last axis, padded to 128.
    return jnp.concatenate([halving_sum(each, axis) for each in each_group(x, group)], axis)


def group_maxima(x: jax.Array, quantizer: Quantizer, axis: int) -> jax.Array:
    """Maximum of `x` (..., K, N), at least 0, over the weights that share a scale, to the shape of the scales."""
    if quantizer.group == "tensor":
        return x.max(axis=(-1, -2), keepdims=True)
    axis, group = axis % x.ndim, group_size(x.shape, quantizer, axis)
    if axis < x.ndim - 1:
        return split_groups(x, group, axis).max(axis=axis + 1)
    return jnp.concatenate([each.max(axis, keepdims=True) for each in each_group(x, group)], axis)  # as group_totals


def group_means(x: jax.Array, quantizer: Quantizer, axis: int, times: float = 1.0) -> jax.Array:
    """`times` the mean of `x` (..., K, N), float32, over the weights that share a scale, to the shape of the scales.

    The result is bit-identical under jit, scan and sharding. It is 0 only if the sum is 0: a tiny mean is raised to the
    smallest normal float32.
    """
    total = group_totals(x, quantizer, axis)
    # times/n is one constant: under jit XLA would turn a division by n into a multiplication, which rounds differently.
    mean = total * jnp.asarray(times / group_members(x.shape, quantizer, axis), jnp.float32)
    return jnp.where(total == 0, 0.0, jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))


def group_members(shape: tuple[int, ...], quantizer: Quantizer, axis: int) -> npt.NDArray[Any]:
    """Number of weights that share each scale, broadcastable to the scales; the last group of a row may be short."""
    length = shape[axis]
    if quantizer.group == "tensor":
        return np.array(length * shape[-3 - axis])
    group = group_size(shape, quantizer, axis)
    own = np.minimum(group, length - group * np.arange(-(-length // group)))
    return np.expand_dims(own, -1) if axis == -2 else own


def _rounded(scale: jax.Array, quantizer: Quantizer) -> jax.Array:
    if quantizer.scale_bits < 24:
        # XLA may remove a cast to a narrow dtype and back.
        scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=quantizer.scale_bits - 1)
    return jnp.maximum(scale, quantizer.smallest_scale)
