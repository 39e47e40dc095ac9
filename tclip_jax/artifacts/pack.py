"""Latent float parameters to packed ones: the same tree with `TernaryTensor` leaves, or in the bytes of a device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from tclip_jax.models.ternary_rules import (
    TERNARIZABLE,
    TernaryRules,
    find_quantizer,
    input_axis,
    is_learned_scale,
    matrix_shape,
)
from tclip_jax.parallel.sharding import path_of
from tclip_jax.ternary import PackedTensor, TernaryTensor, pack_rows, repack, ternarize
from tclip_jax.ternary.tensor import Activations

_ternarize = jax.jit(ternarize, static_argnums=(1, 2))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a parameter tree by path, a `TernaryTensor` or `PackedTensor` being one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)
    return {path_of(key_path): leaf for key_path, leaf in leaves}


def pack_params(params: Mapping[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Ternarizes what `rules` name; NumPy leaves.

    The trits and scales are, to the bit, those that the model computes from the same latent weights in training;
    learned scales are in them and no longer beside them. Leaves that are ternary already stay as they are.

    Raises:
      ValueError: a weight to be made ternary that holds NaN or infinity; with a learned scale it would be 0 or ±1.
    """
    leaves = flatten(params)

    def pack(path: str, leaf: Any) -> Any:
        leaf, quantizer = jax.device_get(leaf), find_quantizer(path, rules) if path in TERNARIZABLE else None
        if quantizer is None or isinstance(leaf, TernaryTensor):
            return leaf
        if not np.isfinite(leaf).all():
            raise ValueError(f"{path} holds NaN or infinity: every weight must be finite")
        alpha = jax.device_get(leaves[f"{path}_scale"]) if quantizer.learned else None
        return jax.device_get(_ternarize(leaf.reshape(matrix_shape(leaf.shape)), quantizer, input_axis(path), alpha))

    packed = {path: pack(path, leaf) for path, leaf in leaves.items() if not is_learned_scale(path)}
    return unflatten_dict(packed, sep="/")


def repack_leaf(
    leaf: Any,
    *,
    implementation: str | None = None,
    activations: Activations = "A16",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Any:
    """The trits of a leaf in the bytes that the implementation for this device reads, four to a byte or denser.

    Args:
      leaf: of a tree from `pack_params`; one that holds no trits stays as it is.
      implementation: forces one of `tclip_jax.ternary.kernels.NAMES`.
      activations: "A16" multiplies activations as they are, "A8" rounds those of each token to int8.
      dtype: of the activations.

    Raises:
      ValueError: an implementation that cannot run here, with the reason.
    """
    if not isinstance(leaf, TernaryTensor):
        return leaf
    leaf = jax.device_get(leaf)
    if leaf.axis == -1:
        return pack_rows(leaf)
    return repack(leaf, dtype=dtype, activations=activations, implementation=implementation)


def repack_params(params: Mapping[str, Any], **how: Any) -> dict[str, Any]:
    """The tree with every leaf as `repack_leaf` makes it; it takes the same further arguments."""
    return jax.tree.map(functools.partial(repack_leaf, **how), params, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedTensor | TernaryTensor)
