"""From full precision to ternary by degrees: weights that are a share quantized, and the rest latent."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tclip_jax.models.ternary_rules import TERNARIZABLE, TernaryRules, find_quantizer
from tclip_jax.parallel.rules import path_of


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "share"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Blend:
    """Stands in a parameter tree for a latent weight that is computed with as share · ŵ + (1 − share) · w.

    At a share of 1 that is ŵ to the bit.

    Attributes:
      weight: the latent weight, stacked layers on its first axis.
      share: float32, a scalar, or one for each layer.
    """

    weight: jax.Array
    share: jax.Array


def blend_params(params: Any, rules: TernaryRules, share: jax.Array) -> Any:
    """The tree with a `Blend` in place of every latent weight that `rules` name; `share` is a scalar from 0 to 1."""

    def blend(key_path: tuple[Any, ...], leaf: jax.Array) -> Any:
        path = path_of(key_path)
        if path not in TERNARIZABLE or find_quantizer(path, rules) is None:
            return leaf
        return Blend(leaf, jnp.broadcast_to(share, (len(leaf),)) if "/blocks/" in path else share)

    return jax.tree_util.tree_map_with_path(blend, params)
