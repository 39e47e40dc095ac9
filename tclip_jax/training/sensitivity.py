"""How much the loss of a run rises when some of its weights are quantized and all others stay latent floats."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from matplotlib.figure import Figure

from tclip_jax.artifacts.pack import bias_path, flatten, pack_params
from tclip_jax.models.ternary_rules import TERNARIZABLE, find_quantizer, input_axis, matrix_shape
from tclip_jax.pages import aligned
from tclip_jax.runs.config import EvalConfig, LossConfig, RunConfig
from tclip_jax.ternary import QuantizedTensor, Quantizer, find_levels, initial_alpha
from tclip_jax.training.build import Build
from tclip_jax.training.validation import ValidationLoss

# Bits of a trit, five of which are a byte, of a scale, and of a float.
TRIT_BITS, SCALE_BITS, FLOAT_BITS = 8 / 5, 16, 16
TERNARY, FOUR_BITS, FLOAT = "ternary", "4 bits", "float"
PRECISIONS = (TERNARY, FOUR_BITS)
ALL = "all"


class Part(NamedTuple):
    """Weights that are quantized together.

    Attributes:
      name: what the table shows, such as "image/blocks/mlp/fc1/kernel", with "[2]" for one layer.
      places: parameter path and layer of each matrix; the layer is None for all layers, or for a parameter without.
      weights: number of weights.
      bits: bits of one weight in each precision, with its share of the scale.
    """

    name: str
    places: tuple[tuple[str, int | None], ...]
    weights: int
    bits: dict[str, float]


class Row(NamedTuple):
    """A part, and how much the loss is above that of the float model when it is quantized, by precision."""

    part: Part
    rises: dict[str, float]


class Sensitivity(NamedTuple):
    """The loss of the float model, and the rows, the largest rise first; the last row is the whole model."""

    float_loss: float
    rows: list[Row]


def float_run(run: RunConfig) -> RunConfig:
    """Return a run with the same model and data, without quantizers, a teacher or any loss but the task.

    Raises:
      ValueError: the loss has a bias that is no parameter of the model, so that it is not known here.
    """
    if run.loss.sigmoid and run.model.init_logit_bias is None:
        raise ValueError("the run's sigmoid loss has a bias outside the model: set config.model.init_logit_bias")
    loss = LossConfig(task=1.0, task_kind=run.loss.task_kind, positives=run.loss.positives)
    data = dataclasses.replace(run.data, teacher_cache="")
    return dataclasses.replace(run, ternary="none", teacher="", loss=loss, data=data)


def parts_of(run: RunConfig, params: Any, by: str) -> list[Part]:
    """Return the parts of a model.

    Args:
      run: its quantizers, see `quantizer_of`.
      params: latent parameters, or their shapes.
      by: "parameter" for all layers of a parameter, as rules select them; "matrix" for each layer; "block" for all
        matrices of a block.
    """
    places: dict[str, list[tuple[str, int | None]]] = {}
    leaves = {path: leaf for path, leaf in flatten(params).items() if path in TERNARIZABLE}
    for path, leaf in leaves.items():
        if by == "parameter" or "/blocks/" not in path:
            places[path] = [(path, None)]
            continue
        for layer in range(leaf.shape[0]):
            name = f"{path}[{layer}]" if by == "matrix" else f"{path.partition('/')[0]}/blocks[{layer}]"
            places.setdefault(name, []).append((path, layer))

    def part(name: str) -> Part:
        sizes = [leaves[path].size // (1 if layer is None else leaves[path].shape[0]) for path, layer in places[name]]
        bits = {
            precision: sum(
                size * _bits(path, leaves[path], quantizer_of(run, path, precision))
                for size, (path, _) in zip(sizes, places[name], strict=True)
            )
            / sum(sizes)
            for precision in PRECISIONS
        }
        return Part(name, tuple(places[name]), sum(sizes), bits)

    return [part(name) for name in places]


def quantizer_of(run: RunConfig, path: str, precision: str) -> Quantizer:
    """Return the quantizer of a parameter: for 4 bits a uniform one, in the groups of `config.quantizer`.

    For trits it is that of the rules, or else `config.quantizer`; if that is uniform too, the default.
    """
    if precision == FOUR_BITS:
        return dataclasses.replace(run.quantizer, kind="uniform", bits=4, options=(), dead_zone_bias=0.0)
    candidates = (find_quantizer(path, run.rules), run.quantizer, Quantizer())
    return next(each for each in candidates if each and not each.uniform)


def measure(run: RunConfig, params: Any, loss: Callable[[Any], float], by: str = "parameter") -> Sensitivity:
    """Return how much the loss rises as each part, and at last the whole model, is quantized.

    A part has the integers, scales and biases that packing gives it, so that the whole is the packed model.

    Args:
      run: see `parts_of`.
      params: latent parameters of the model.
      loss: the loss of a model with these parameters, all used as floats.
      by: see `parts_of`.
    """
    leaves = flatten(params)
    packed = {precision: _packed(run, leaves, precision) for precision in PRECISIONS}
    parts, base = parts_of(run, params, by), loss(params)

    def rise(part: Part, precision: str) -> float:
        changed = dict(leaves)
        for weight, layer in part.places:
            for path in (weight, bias_path(weight)):
                if path in leaves:
                    made = packed[precision][path]
                    changed[path] = made if layer is None else changed[path].at[layer].set(made[layer])
        return loss(unflatten_dict(changed, sep="/")) - base

    def row(part: Part) -> Row:
        return Row(part, {precision: rise(part, precision) for precision in PRECISIONS})

    count = sum(part.weights for part in parts)
    bits = {name: sum(part.weights * part.bits[name] for part in parts) / count for name in PRECISIONS}
    whole = Part(ALL, tuple(place for part in parts for place in part.places), count, bits)
    return Sensitivity(base, [*sorted(map(row, parts), key=lambda each: -each.rises[TERNARY]), row(whole)])


def validation_loss(run: RunConfig, mesh: Mesh, config: EvalConfig, *, pairs: int = 0) -> Callable[[Any], float]:
    """Return the mean task loss over held-out pairs, as a function of the parameters of a float model.

    Args:
      run: from `float_run`.
      mesh: the devices.
      config: source, split, templates and batch size.
      pairs: the most pairs, the first in a fixed random order; 0 for all.

    Raises:
      FileNotFoundError, ValueError: the data are missing, empty or unusable.
    """
    build, validation = Build(run, mesh, None), ValidationLoss(config, run, pairs=pairs)

    def loss(params: Any) -> float:
        with jax.set_mesh(mesh):
            return validation({"clip": params}, build, None)[0]["loss"]

    return loss


def check_budget(parts: Sequence[Part], bits: float) -> None:
    """Raise ValueError if the mean bits of a weight are above the budget `bits` even if all parts are ternary."""
    least = sum(part.weights * part.bits[TERNARY] for part in parts) / sum(part.weights for part in parts)
    if bits < least:
        raise ValueError(f"--bits {bits:g} is below {least:.2f}, the bits of a weight if all are ternary")


def propose_rules(run: RunConfig, measured: Sensitivity, bits: float) -> tuple[list[tuple[str, dict[str, Any]]], float]:
    """Propose `config.ternary` within a budget.

    All parameters start ternary. The change to 4 bits or to floats that lowers the loss most for each added bit is made
    while the budget allows it, and so on; rises are taken to add up.

    Args:
      run: the run; `measured` must be by parameter, because rules select whole parameters.
      measured: the result of `measure`.
      bits: the budget, the mean bits of a weight over all parameters.

    Returns:
      Pairs (regex, {changed keys}) of the parameters that are not float, and the mean bits of a weight.

    Raises:
      ValueError: the budget is below that of the ternary model.
    """
    rows = {row.part.name: row for row in measured.rows if row.part.name != ALL}
    count = sum(row.part.weights for row in rows.values())
    chosen = dict.fromkeys(rows, TERNARY)

    def size(name: str, precision: str) -> float:
        part = rows[name].part
        return part.weights * part.bits.get(precision, FLOAT_BITS)

    def gain(name: str, precision: str) -> float:
        """How much the loss falls for each added bit; 0 for a change that does not help, or costs nothing."""
        added = size(name, precision) - size(name, chosen[name])
        falls = rows[name].rises[chosen[name]] - rows[name].rises.get(precision, 0.0) if added > 0 else 0.0
        return falls / added if falls > 0 else 0.0

    check_budget([row.part for row in rows.values()], bits)
    used = sum(size(name, TERNARY) for name in rows)
    while True:
        changes = {
            (name, precision): gain(name, precision)
            for name, now in chosen.items()
            for precision in (FOUR_BITS, FLOAT)
            if now != FLOAT and used + size(name, precision) - size(name, now) <= bits * count
        }
        best = max(changes, key=lambda change: changes[change], default=None)
        if best is None or changes[best] == 0:
            break
        name, precision = best
        used += size(name, precision) - size(name, chosen[name])
        chosen[name] = precision
    rules = [
        (re.escape(name), _changed_keys(run, quantizer_of(run, name, chosen[name])))
        for name in sorted(rows)
        if chosen[name] != FLOAT
    ]
    return rules, used / count


def _changed_keys(run: RunConfig, quantizer: Quantizer) -> dict[str, Any]:
    """The keys of a quantizer that differ from `config.quantizer`, also those that have their default."""
    ours, whole = (dataclasses.asdict(each) | {"options": dict(each.options)} for each in (quantizer, run.quantizer))
    return {name: value for name, value in ours.items() if whole[name] != value}


def sensitivity_text(measured: Sensitivity) -> str:
    """Return the table of the rows."""
    columns = [f"{what}{precision}" for what in ("bits, ", "rise, ") for precision in PRECISIONS]
    lines = [["part", "weights", *columns]]
    for row in measured.rows:
        bits = [f"{row.part.bits[precision]:.2f}" for precision in PRECISIONS]
        lines.append(
            [row.part.name, f"{row.part.weights:,}", *bits, *(f"{row.rises[name]:+.4f}" for name in PRECISIONS)]
        )
    return "\n".join([*aligned(lines), f"The loss as floats is {measured.float_loss:.4f}."])


def plot_sensitivity(measured: Sensitivity) -> Figure:
    """Return a figure with two bars for each part: the rise of the loss as trits, and in 4 bits."""
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(measured.rows)), layout="constrained", dpi=110)
    axes, height = figure.subplots(), 0.4
    for number, (precision, color) in enumerate(zip(PRECISIONS, ("#d1603d", "#3b6fb6"), strict=True)):
        places = [place + (number - 0.5) * height for place in range(len(measured.rows))]
        axes.barh(places, [row.rises[precision] for row in measured.rows], height, color=color, label=precision)
    axes.set_yticks(range(len(measured.rows)), [row.part.name for row in measured.rows])
    axes.axvline(0, color="#9aa5b1")
    axes.set_xlabel(f"rise of the loss, {measured.float_loss:.4f} as floats")
    axes.legend(frameon=False)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bits(path: str, leaf: Any, quantizer: Quantizer) -> float:
    shape = matrix_shape(leaf.shape)
    levels = jax.eval_shape(
        lambda w: find_levels(w, quantizer, input_axis(path), _alpha(w, quantizer, path)).scale,
        jax.ShapeDtypeStruct(shape, jax.numpy.float32),
    )
    return (quantizer.bits if quantizer.uniform else TRIT_BITS) + SCALE_BITS * levels.size / leaf.size


def _alpha(w: Any, quantizer: Quantizer, path: str) -> Any:
    return initial_alpha(w, quantizer, input_axis(path)) if quantizer.learned else None


def _packed(run: RunConfig, leaves: dict[str, Any], precision: str) -> dict[str, Any]:
    """The leaves of the model whose weights all have this precision, packed, and its integers as floats again."""
    quantizers = {path: quantizer_of(run, path, precision) for path in leaves if path in TERNARIZABLE}
    scales = {  # those of the weights that the run does not train with a learned scale
        f"{path}_scale": _alpha(leaves[path].reshape(matrix_shape(leaves[path].shape)), quantizer, path)
        for path, quantizer in quantizers.items()
        if quantizer.learned and f"{path}_scale" not in leaves
    }
    rules = tuple((re.escape(path), quantizer) for path, quantizer in quantizers.items())
    packed = flatten(pack_params(unflatten_dict(leaves | scales, sep="/"), rules))
    return {
        path: jax.device_put(leaf.dequantize().reshape(leaves[path].shape), leaves[path].sharding)
        if isinstance(leaf, QuantizedTensor)
        else leaf
        for path, leaf in packed.items()
    }
