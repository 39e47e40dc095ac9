"""Compare a model's activations with a recording, and name the first tap over the error budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.inference.model import Model
from tclip_jax.keys import Recipe
from tclip_jax.numerics.configurations import differences, other_shapes
from tclip_jax.numerics.golden import Recording, model_recipe
from tclip_jax.numerics.guess import guess
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.taps import Taps, collect_taps
from tclip_jax.numerics.weights import Difference, compare_taps, end_metrics, first_over

# At every tap of ViT-L-14 float32 rounding stays below 1e-5; GELU with tanh instead of erf exceeds 1e-4.
BUDGET = 2e-5


def record(
    model: Model,
    pixels: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    *,
    precision: str = "highest",
    dtype: jax.typing.DTypeLike = "float32",
    reference: Taps | None = None,
    epsilon: float | None = None,
) -> Recording:
    """Run a model in JAX and record its activations.

    Args:
      model: a model with latent or packed weights.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.
      precision: matmul precision, a value of jax_default_matmul_precision.
      dtype: dtype of the computation.
      reference: recorded taps that replace the model's own as inputs; see `collect_taps`.
      epsilon: of every LayerNorm, in place of the model's own.
    """
    with jax.default_matmul_precision(precision):
        taps = collect_taps(model, pixels, tokens, reference, dtype, epsilon)
    facts = {"run by": f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {dtype}, precision {precision}"}
    return Recording(pixels, tokens, taps, model.logit_scale, facts)


def activations_report(
    title: str,
    model: Model,
    reference: Recording,
    *,
    budget: float = BUDGET,
    precision: str = "highest",
    dtype: jax.typing.DTypeLike = "float32",
    stated: Recipe | None = None,
) -> Report:
    """Run a model on a recording's inputs and compare the configurations and the activations.

    Taps are compared twice: cumulative, computed from the model's own earlier taps, and isolated, computed from the
    recorded earlier taps. The report passes if every isolated tap and both final embeddings are within the budget, and
    the configuration and preprocessing of the model are those that the recording states. Accumulated errors at other
    taps are reported only. If the configurations give taps of different shapes, nothing is run.

    Args:
      title: title of the report.
      model: a model with latent or packed weights.
      reference: the recording.
      budget: the largest relative error that passes.
      precision: matmul precision, a value of jax_default_matmul_precision.
      dtype: dtype of the computation.
      stated: what the files of the model state, as `model_recipe`; None for all that `model` has.

    Raises:
      ValueError: the recording's inputs or taps have other shapes than the model's, and no configuration says why.
    """
    differing = differences(model_recipe(model) if stated is None else stated, reference.made_by)
    facts = {f"reference {name}": value for name, value in reference.facts.items()}
    if other_shapes(differing):
        verdict = ("the models have different shapes, so no activation can be compared",)
        return Report(title, facts, {}, budget, verdict, False, differing)
    pixels, tokens = reference.pixels, reference.tokens
    inputs = (pixels.shape[1:], tokens.shape[1:])
    expected = ((*model.config.vision.image_size, 3), (model.config.text.context_length,))
    if inputs != expected:
        raise ValueError(f"the reference was run on pixels and tokens of shapes {inputs}: the model takes {expected}")

    def rerun(changed: Model, epsilon: float | None) -> Taps:
        return record(
            changed, pixels, tokens, precision=precision, dtype=dtype, reference=reference.taps, epsilon=epsilon
        ).taps

    ours = record(model, pixels, tokens, precision=precision, dtype=dtype)
    cumulative = compare_taps(ours.taps, reference.taps)
    isolated = compare_taps(rerun(model, None), reference.taps)
    first = first_over(isolated, budget)
    ends = [row for row in cumulative if row.name.endswith("/embedding") and row.over(budget)]
    unread = "configuration" in reference.facts  # why its files state no configuration that can be compared
    passed = not (first or ends or differing or unread)
    end = end_metrics(ours.taps, reference.taps, (ours.logit_scale, reference.logit_scale))
    facts = {"ours": ours.facts["run by"], **facts}
    facts |= {
        "images classified alike": f"{end['agreement']:.0%}",
        "KL of their classes": f"mean {end['kl_mean']:.2g}, max {end['kl_max']:.2g} nats",
    }
    return Report(
        title,
        facts,
        {"cumulative": cumulative, "isolated": isolated},
        budget,
        (_verdict(isolated, first, ends, budget), *(["the reference's configuration is not compared"] * unread)),
        passed,
        differing,
        first,
        "" if passed else guess(model, reference, isolated, budget, differing, rerun),
    )


def _verdict(
    isolated: Sequence[Difference], first: Mapping[str, str], ends: Sequence[Difference], budget: float
) -> str:
    """Return the result of all taps as a phrase: the first over budget, or the largest error."""
    errors = {row.name: f"{row.name} ({row.relative:.1e})" for row in isolated}
    if first:
        return f"first over budget {budget:g}: {' and '.join(errors[name] for name in first.values())}"
    if ends:
        names = " and ".join(f"{row.name} ({row.relative:.1e})" for row in ends)
        return f"over budget {budget:g} at the end: {names}; no tap is by itself"
    worst = max(isolated, key=lambda row: row.relative)
    return f"{len(isolated)} taps within budget {budget:g}; the largest error is at {errors[worst.name]}"
