"""Compare a model's activations with a recording, and name the first tap over the error budget."""

from __future__ import annotations

import jax
import numpy as np
import numpy.typing as npt

from tclip_jax.inference.model import Model
from tclip_jax.keys import difference
from tclip_jax.numerics.golden import Recording, model_recipe
from tclip_jax.numerics.report import Report
from tclip_jax.numerics.taps import Taps, collect_taps
from tclip_jax.numerics.weights import compare_taps, end_metrics, first_over

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
) -> Recording:
    """Run a model in JAX and record its activations.

    Args:
      model: a model with latent or packed weights.
      pixels: normalised images (B, H, W, 3) float32.
      tokens: token ids (B, T) int32.
      precision: matmul precision, a value of jax_default_matmul_precision.
      dtype: dtype of the computation.
      reference: recorded taps that replace the model's own as inputs; see `collect_taps`.
    """
    with jax.default_matmul_precision(precision):
        taps = collect_taps(model, pixels, tokens, reference, dtype)
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
) -> Report:
    """Run a model on a recording's inputs and compare the activations.

    Taps are compared twice: cumulative, computed from the model's own earlier taps, and isolated, computed from the
    recorded earlier taps. The report passes if every isolated tap and both final embeddings are within the budget, and
    the model has the configuration and preprocessing in the recording, if it states them. Accumulated errors at other
    taps are reported only.

    Args:
      title: title of the report.
      model: a model with latent or packed weights.
      reference: the recording.
      budget: the largest relative error that passes.
      precision: matmul precision, a value of jax_default_matmul_precision.
      dtype: dtype of the computation.

    Raises:
      ValueError: the recording's inputs or taps have other shapes than the model's.
    """
    pixels, tokens = reference.pixels, reference.tokens
    inputs = (pixels.shape[1:], tokens.shape[1:])
    expected = ((*model.config.vision.image_size, 3), (model.config.text.context_length,))
    if inputs != expected:
        raise ValueError(f"the reference was run on pixels and tokens of shapes {inputs}: the model takes {expected}")
    ours = record(model, pixels, tokens, precision=precision, dtype=dtype)
    cumulative = compare_taps(ours.taps, reference.taps)
    forced = record(model, pixels, tokens, precision=precision, dtype=dtype, reference=reference.taps)
    isolated = compare_taps(forced.taps, reference.taps)
    first = first_over(isolated, budget)
    ends = [row.name for row in cumulative if row.name.endswith("/embedding") and row.over(budget)]
    verdict = [
        *(
            f"{tower} tower, first tap over budget {budget:g}: {first.get(tower, 'none')}"
            for tower in ("image", "text")
        ),
        *(f"{name} is over budget at the end" for name in ends),
    ]
    mismatch = difference(reference.made_by, model_recipe(model)) if reference.made_by else ""
    if mismatch:
        verdict.append(f"the reference is of another model: {mismatch}")
    end = end_metrics(ours.taps, reference.taps, (ours.logit_scale, reference.logit_scale))
    facts = {
        "ours": ours.facts["run by"],
        **{f"reference {name}": value for name, value in reference.facts.items()},
        "images classified alike": f"{end['agreement']:.0%}",
        "KL of their classes": f"mean {end['kl_mean']:.2g}, max {end['kl_max']:.2g} nats",
    }
    tables = {"cumulative": cumulative, "isolated": isolated}
    return Report(title, facts, tables, budget, tuple(verdict), not (first or ends or mismatch))
