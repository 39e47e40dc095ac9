"""Where training starts when it does not start from random weights: another run, an artifact, a foreign checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from tclip_jax.artifacts.pack import flatten
from tclip_jax.interop.checkpoints import is_checkpoint
from tclip_jax.interop.latent import latent_params
from tclip_jax.interop.recover import NotTernaryError, recover_parameter
from tclip_jax.models.clip import param_shapes, with_learned_scales
from tclip_jax.models.inherit import inherit_params
from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer
from tclip_jax.parallel.rules import tree_shardings
from tclip_jax.ternary import TernaryTensor
from tclip_jax.training.config import RunConfig
from tclip_jax.training.restore import Stored, load_known, load_stored


def start_params(run: RunConfig, mesh: Mesh) -> tuple[Any, dict[str, Any] | None]:
    """What `config.init` or `config.inherit` gives a run, over `mesh`, and its origin; None where neither is set.

    Raises what `initial_weights`, `load_model` and `inherit_params` raise.
    """
    if run.init:
        source = load_stored(run.init)
        start, origin = initial_weights(run, source), dict(source.origin)
    elif run.inherit:
        wider, origin = load_known(run.inherit)
        start = with_learned_scales(inherit_params(wider.params, wider.config, run.model), run.rules)
    else:
        return None, None
    return jax.device_put(start, tree_shardings(start, mesh)), origin


def initial_weights(run: RunConfig, source: Stored | None = None) -> dict[str, Any]:
    """The latent float32 weights (NumPy) that `config.init` gives a run; `source` if it is loaded already.

    Float weights are latent weights, those of another run included. Ternary ones, also where a foreign checkpoint holds
    them as floats that are exactly scale · trit, are treated as `config.init_scales` says: "keep" finds latent weights
    that give the same trits and scales in the first step, to the bit; "recompute" takes scale · trit for the latent
    weights, from which the quantizer makes its own scales (and, where 2/k of a group or more are nonzero, only zeros).

    Raises:
      FileNotFoundError: no such source.
      ValueError: a model of another shape, activation or pixel statistics; ternary weights that the rules of the run do
        not reproduce, naming the first and why; one line.
    """
    source = load_stored(run.init) if source is None else source
    _check_same(run, source)
    params = source.params
    if run.init_scales == "keep":
        if is_checkpoint(run.init):
            params = _recovered(params, run.rules)
        try:
            params = latent_params(params, run.rules)
        except ValueError as error:
            fit = 'make config.ternary and config.quantizer fit, or set config.init_scales = "recompute"'
            raise ValueError(f"config.init {run.init}: {error}; {fit}") from None
    shapes = {path: leaf.shape for path, leaf in flatten(param_shapes(run.model, run.rules)).items()}
    leaves = {path: _floats(leaf) for path, leaf in flatten(params).items()}
    # Learned scales stay where the rules ask for the same; the patch embedding is a matrix only while it is ternary.
    kept = {path: leaf for path, leaf in leaves.items() if leaf.size == math.prod(shapes.get(path, (0,)))}
    reshaped = {path: leaf.reshape(shapes[path]) for path, leaf in kept.items()}
    return with_learned_scales(unflatten_dict(reshaped, sep="/"), run.rules)


def _check_same(run: RunConfig, source: Stored) -> None:
    pixels = (("mean", source.preprocess.mean, run.preprocess.mean), ("std", source.preprocess.std, run.preprocess.std))
    theirs, ours = (flatten_dict(dataclasses.asdict(config), sep=".") for config in (source.config, run.model))
    model = [(f"model {option}", theirs[option], ours[option]) for option in theirs]
    for option, its, wanted in (*model, *((f"preprocess {name}", its, wanted) for name, its, wanted in pixels)):
        if its != wanted:
            raise ValueError(f"config.init {run.init}: its {option} is {its}, that of the run {wanted}")


def _recovered(params: dict[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """With `TernaryTensor` for the floats that have a rule and are exactly scale · trit."""
    leaves = flatten(params)
    for path in TERNARIZABLE:
        if find_quantizer(path, rules) and not _is_ternary(leaves[path]):
            with contextlib.suppress(NotTernaryError):
                leaves[path] = recover_parameter(path, leaves[path])
    return unflatten_dict(leaves, sep="/")


def _floats(leaf: Any) -> Any:
    return np.asarray(leaf.dequantize() if _is_ternary(leaf) else leaf, np.float32)


def _is_ternary(leaf: Any) -> bool:
    return isinstance(leaf, TernaryTensor)
