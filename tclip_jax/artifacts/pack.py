"""Pack latent parameters: into a tree with `QuantizedTensor` leaves, or into the layout that a device's kernel has."""

from __future__ import annotations

import dataclasses
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
from tclip_jax.ternary import (
    PackedTensor,
    QuantizedTensor,
    TernaryTensor,
    UniformTensor,
    dead_zone_bias,
    default_activations,
    pack_rows,
    quantize,
    repack,
)
from tclip_jax.ternary.packing import narrow_scale
from tclip_jax.ternary.tensor import Activations

compiled_quantize = jax.jit(quantize, static_argnums=(1, 2))
_compiled_dead_zone_bias = jax.jit(dead_zone_bias, static_argnums=(1, 2))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a parameter tree by path; a `QuantizedTensor` or `PackedTensor` is one leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_packed)
    return {path_of(key_path): leaf for key_path, leaf in leaves}


def bias_path(path: str) -> str:
    """Return the path of the bias beside a weight; a layer need not have one."""
    return f"{path.rpartition('/')[0]}/bias"


def pack_params(params: Mapping[str, Any], rules: TernaryRules) -> dict[str, Any]:
    """Quantize the weights that `rules` match.

    Integers and scales are bit-identical to those that the model computes from the same latent weights in training.
    Learned scales are folded into the quantized leaves. The bias that dead-zone weights make is folded into that of
    their layer. Leaves that are already quantized are unchanged.

    Args:
      params: latent parameter tree.
      rules: the quantizer for each path pattern.

    Returns:
      The tree with `TernaryTensor` and `UniformTensor` leaves, in NumPy.

    Raises:
      ValueError: a weight to quantize holds NaN or infinity; a learned scale would turn it into a valid trit.
    """
    leaves = flatten(params)
    biases: dict[str, Any] = {}

    def pack(path: str, leaf: Any) -> Any:
        leaf, quantizer = jax.device_get(leaf), find_quantizer(path, rules) if path in TERNARIZABLE else None
        if quantizer is None or isinstance(leaf, QuantizedTensor):
            return leaf
        if not np.isfinite(leaf).all():
            raise ValueError(f"{path} holds NaN or infinity: every weight must be finite")
        alpha = jax.device_get(leaves[f"{path}_scale"]) if quantizer.learned else None
        matrix = leaf.reshape(matrix_shape(leaf.shape))
        bias = bias_path(path)
        if quantizer.dead_zone_bias and bias in leaves:
            added = jax.device_get(_compiled_dead_zone_bias(matrix, quantizer, input_axis(path), alpha))
            biases[bias] = np.float32(jax.device_get(leaves[bias])) + added
        return jax.device_get(compiled_quantize(matrix, quantizer, input_axis(path), alpha))

    packed = {path: pack(path, leaf) for path, leaf in leaves.items() if not is_learned_scale(path)}
    return unflatten_dict(packed | biases, sep="/")


def repack_leaf(
    leaf: Any,
    *,
    implementation: str | None = None,
    activations: Activations | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Any:
    """Pack the trits of a leaf, four or more to a byte, in the layout of this device's kernel.

    A `UniformTensor` stays packed as it is, with its scales in bfloat16 where that is exact.

    Args:
      leaf: a leaf of a tree from `pack_params`; a float leaf is returned unchanged.
      implementation: one of `tclip_jax.ternary.kernels.NAMES`; None selects the default of this device.
      activations: "A32" multiplies activations unchanged; "A16" and "A8" round them to int16 or int8, with a scale for
        each token; None selects `default_activations`.
      dtype: dtype of the activations.

    Raises:
      ValueError: the implementation cannot run on this device; the message has the reason.
    """
    if isinstance(leaf, UniformTensor):
        narrow: Any = narrow_scale(np.asarray(leaf.scale, np.float32))
        return dataclasses.replace(leaf, scale=narrow)
    if not isinstance(leaf, TernaryTensor):
        return leaf
    leaf = jax.device_get(leaf)
    if leaf.axis == -1:
        return pack_rows(leaf)
    activations = activations or default_activations(implementation)
    return repack(leaf, dtype=dtype, activations=activations, implementation=implementation)


def repack_params(params: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Apply `repack_leaf`, with the keyword arguments `options`, to every leaf of a tree from `pack_params`."""
    return jax.tree.map(functools.partial(repack_leaf, **options), params, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, PackedTensor | QuantizedTensor)


def check_no_uniform(params: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for the first parameter with integers of 4 or 8 bits; `what` is the format without them."""
    for path, leaf in flatten(params).items():
        if isinstance(leaf, UniformTensor):
            raise ValueError(
                f"{path} has integers of {leaf.bits} bits: {what} holds ternary and float weights; onnx, litert and"
                " stablehlo hold it too, and open_clip, hf and big_vision as floats"
            )
