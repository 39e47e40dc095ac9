"""Guess why a model's activations differ from a recording: try what could differ, and read the pattern of the taps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tclip_jax.inference.model import Model
from tclip_jax.models.ternary_rules import PATCH_EMBEDDING, find_quantizer
from tclip_jax.models.vision import patchify
from tclip_jax.numerics.configurations import Differences
from tclip_jax.numerics.golden import Recording
from tclip_jax.numerics.taps import Taps
from tclip_jax.numerics.weights import Difference, compare_taps

_EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-7, 1e-4, 1e-3)  # of LayerNorms in models of other libraries
_FIT = 1e-3  # relative error below which pixels are those of another mean and standard deviation

# Taps of a changed model, or with another epsilon of its LayerNorms; each tap is computed from the recorded ones.
Rerun = Callable[[Model, float | None], Taps]


def guess(
    model: Model,
    reference: Recording,
    isolated: Sequence[Difference],
    budget: float,
    configurations: Differences,
    rerun: Rerun,
) -> str:
    """Return a guess of what the first taps over budget mean.

    Args:
      model: the model that is checked.
      reference: the recording.
      isolated: the differences of its taps, each computed from the recorded ones.
      budget: the largest relative error that passes.
      configurations: options that the two models state differently.
      rerun: runs a changed model.

    Returns:
      A phrase for each tower with another cause, separated by semicolons; "" if there is nothing to guess from.
    """
    over = [row for row in isolated if row.over(budget)]
    if not over:
        if any(name.startswith("preprocess.") for name in configurations):
            return "the images are preprocessed differently; from equal pixels both models compute the same"
        return "" if configurations else "rounding that adds up over the layers; compare with a larger --budget"
    if over[0].nonfinite:
        return f"numbers that are not finite, first in {over[0].name}: an overflow, or damaged weights"
    if {"image/patch_embedding", "image/projection", "text/projection"} <= {row.name for row in over}:
        return (
            "a lower precision of the products, such as bfloat16 or TF32: even those before and after all blocks differ"
        )
    guesses, rerun = [], functools.cache(rerun)
    for tower in ("image", "text"):
        names = [row.name for row in over if row.name.startswith(f"{tower}/")]
        if names:
            rows = [row for row in isolated if row.name.startswith(f"{tower}/")]
            guesses.append(_of_tower(tower, names, rows, model, reference, budget, rerun))
    return "; ".join(dict.fromkeys(guesses))


def _of_tower(
    tower: str,
    names: Sequence[str],
    rows: Sequence[Difference],
    model: Model,
    reference: Recording,
    budget: float,
    rerun: Rerun,
) -> str:
    """Return the guess for a tower, whose taps `names` are over budget."""
    first, kinds = names[0], {_kind(name) for name in names}
    blocks = sum(row.name.endswith("/mlp") for row in rows)

    def explained_by(changed: Model, epsilon: float | None = None) -> bool:
        taps = rerun(changed, epsilon)
        again = compare_taps({row.name: taps[row.name] for row in rows}, {r.name: reference.taps[r.name] for r in rows})
        return not any(row.over(budget) for row in again)

    if first == "image/patch_embedding":
        return _of_pixels(model, reference) or (
            "the pixels (resize, crop, order of the channels) or the weights of the patch embedding"
        )
    if first == "text/token_embedding":
        return "the token ids, or the weights of the token embedding"
    if kinds == {"mlp"}:
        quick = not model.config.quick_gelu
        if explained_by(dataclasses.replace(model, config=dataclasses.replace(model.config, quick_gelu=quick))):
            return f"the activation of the MLPs: the reference has quick_gelu {str(quick).lower()}"
        if len(names) == blocks:
            return "the activation of the MLPs, such as the tanh approximation of GELU: every MLP is over budget"
    if kinds == {"attention"} and tower == "text":
        unmasked = dataclasses.replace(model.config.text, no_causal_mask=not model.config.text.no_causal_mask)
        if explained_by(dataclasses.replace(model, config=dataclasses.replace(model.config, text=unmasked))):
            return f"the causal mask: the reference has {'none' if unmasked.no_causal_mask else 'one'}"
    own = (model.config.vision if tower == "image" else model.config.text).norm_eps
    epsilons = [epsilon for epsilon in _EPSILONS if epsilon != own and explained_by(model, epsilon)]
    if epsilons:
        # Several may explain a tower whose activations are large. The other tower decides.
        distances = {each: _distance(rerun(model, each), reference.taps) for each in epsilons}
        epsilon = min(distances, key=lambda each: distances[each])
        return f"the epsilon of the LayerNorms: the reference has {epsilon:g}, ours is {own:g}"
    if kinds == {"attention"} and len(names) == blocks > 1:
        return "the attention: the number of heads, the scale of the queries, or the mask; every block is over budget"
    if first.endswith("/embedded"):
        return _of_embedded(tower, rows, model, reference, budget, rerun)
    if first.endswith(("/attention", "/mlp")):
        part = "order of queries, keys and values" if first.endswith("/attention") else "order of the layers"
        return f"the weights of {first}, or their {part}; compare weights A B shows more"
    if first.endswith(("/ln_post", "/ln_final")):
        return f"the token that {first} pools, or the weights of that LayerNorm"
    if first.endswith("/projection"):
        return f"the weights of {first}"
    if first.endswith("/embedding"):
        return f"the L2 normalisation of {first}"
    return f"the sum of the residual stream in {first}, such as a LayerScale"


def _distance(ours: Taps, reference: Taps) -> float:
    return sum(row.relative for row in compare_taps(ours, reference))


def _kind(name: str) -> str:
    return name.rpartition("/")[2]


def _of_embedded(
    tower: str, rows: Sequence[Difference], model: Model, reference: Recording, budget: float, rerun: Rerun
) -> str:
    """Return the guess for the input of the blocks, from the tokens that differ."""
    name = f"{tower}/embedded"
    ours, theirs = rerun(model, None)[name], reference.taps[name]
    scale = np.abs(theirs) + np.sqrt(np.mean(theirs.astype(np.float64) ** 2))
    over_T = (np.abs(ours - theirs) / scale).max(axis=(0, 2)) > budget
    count = f"{over_T.sum()} of {len(over_T)} positions differ"
    if tower == "text":
        return f"the position embedding of the texts: {count}"
    if over_T[0] and not over_T[1:].any():
        return "the class embedding, or the position embedding of the class token: no patch differs"
    if not over_T[0]:
        return (
            "the position embedding, such as another interpolation to the image size: the patches differ, and not the"
            f" class token ({count})"
        )
    return f"the position embedding, or the LayerNorm before the blocks (ln_pre): {count}"


def _of_pixels(model: Model, reference: Recording) -> str:
    """Return the mean and standard deviation with which the reference's pixels explain its patches, or "".

    If both normalise the same pixels, the reference's are a · x + b in each channel, for our x. The patch embedding is
    linear, so least squares over all patches find a and b.
    """
    kernel = model.params["image"]["patch_embedding"]["kernel"]
    if not isinstance(kernel, jax.Array) or find_quantizer(PATCH_EMBEDDING, model.rules):
        return ""  # it is ternary
    weights = np.asarray(kernel, np.float64)
    patch, channels = weights.shape[0], weights.shape[2]
    pixels = np.asarray(patchify(jnp.asarray(reference.pixels), patch), np.float64).reshape(-1, patch * patch, channels)
    flat = weights.reshape(patch * patch, channels, -1)
    scaled = [pixels[:, :, c] @ flat[:, c] for c in range(channels)]
    constant = [np.broadcast_to(flat[:, c].sum(axis=0), scaled[0].shape) for c in range(channels)]
    columns = np.stack([each.reshape(-1) for each in (*scaled, *constant)], axis=1)
    target = reference.taps["image/patch_embedding"].astype(np.float64).reshape(-1)
    solution, *_ = np.linalg.lstsq(columns, target, rcond=None)
    if np.linalg.norm(columns @ solution - target) > _FIT * np.linalg.norm(target):
        return ""
    a, b = np.split(solution, 2)
    if (a <= 0).any():
        return ""
    std = np.array(model.preprocess.std) / a
    mean = np.array(model.preprocess.mean) - b * std
    return (
        f"the mean and std of the pixels: the reference's are {_rounded(mean)} and {_rounded(std)}, ours"
        f" {_rounded(model.preprocess.mean)} and {_rounded(model.preprocess.std)}"
    )


def _rounded(values: npt.ArrayLike) -> str:
    return f"({', '.join(f'{value:.3f}' for value in np.asarray(values))})"
