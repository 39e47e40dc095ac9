"""A model's activations against a recording of another's: where do they part?"""

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

# Rounding of float32 stays below 1e-5 at every tap of ViT-L-14; tanh for erf in GELU is above 1e-4.
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
    """Runs a model in JAX.

    Args:
      model: latent or packed.
      pixels: normalised images (B, H, W, 3).
      tokens: (B, T).
      precision: of matrix products, as jax_default_matmul_precision has it.
      dtype: of the computation.
      reference: taps to go on from (`collect_taps`).
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
    """Runs a model on the inputs of a recording, cumulative and isolated (each tap from the recorded earlier ones).

    It passes if every isolated tap and both final embeddings are within the budget, and the model has the shape and
    preprocessing that the recording states, if it does; errors that add up on the way are shown but not judged.

    Raises:
      ValueError: inputs or activations of another shape than the model's.
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
    differs = difference(reference.made_by, model_recipe(model)) if reference.made_by else ""
    if differs:
        verdict.append(f"the reference is of another model: {differs}")
    end = end_metrics(ours.taps, reference.taps, (ours.logit_scale, reference.logit_scale))
    facts = {
        "ours": ours.facts["run by"],
        **{f"reference {name}": value for name, value in reference.facts.items()},
        "images classified alike": f"{end['agreement']:.0%}",
        "KL of their classes": f"mean {end['kl_mean']:.2g}, max {end['kl_max']:.2g} nats",
    }
    tables = {"cumulative": cumulative, "isolated": isolated}
    return Report(title, facts, tables, budget, tuple(verdict), not (first or ends or differs))
