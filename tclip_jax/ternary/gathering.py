"""All-gather of sharded weights, as packed trits and scales or as floats.

Each device quantizes its own shard and sends 2-bit trits and scales. Shardings refer to the mesh in force
(`jax.set_mesh`). The gathered weights are bit-identical to those that a single device computes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tclip_jax.ternary.packing import join_2bit, split_2bit
from tclip_jax.ternary.quantizers import Quantizer, ternarize
from tclip_jax.ternary.tensor import TernaryTensor

# `checkpoint_name` of the values that determine quantized weights: scales, thresholds and packed trits.
LEVELS = "levels"


class Placement(NamedTuple):
    """Shardings of a matrix (K, N) over the mesh in force: as a parameter and in the computation.

    Weights move from `param_spec` to `compute_spec`, gradients move back.

    Attributes:
      param_spec: sharding of the stored parameter.
      compute_spec: sharding of the operand of a product.
    """

    param_spec: PartitionSpec
    compute_spec: PartitionSpec

    def place(self, x: jax.Array) -> jax.Array:
        """Reshard from `param_spec` to `compute_spec`; an axis of size 1 stays unsharded."""
        return _constrain(_constrain(x, self.param_spec), self.compute_spec)

    def place_back(self, x: jax.Array) -> jax.Array:
        """Reshard to `param_spec`, so that a sum over devices is a reduce-scatter and not an all-reduce."""
        return _constrain(x, self.param_spec)


def gather_ternary(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int,
    alpha: jax.Array | None,
    key: jax.Array | None,
    placement: Placement,
    dtype: jax.typing.DTypeLike,
) -> TernaryTensor:
    """Quantize each shard of a matrix, then gather the trits and scales for the computation.

    Args:
      w: latent weights (K, N), sharded as `placement.param_spec`.
      quantizer: as in `ternarize`.
      axis: as in `ternarize`.
      alpha: as in `ternarize`.
      key: as in `ternarize`.
      placement: shardings of `w`.
      dtype: dtype of the scales. Scales of 8 significant bits are bfloat16 if that is not wider than `dtype`.

    Returns:
      The quantized weight, sharded as `placement.compute_spec`.
    """
    packed, scale, group = _moved(w, quantizer, axis, alpha, key, placement, dtype)
    packed, scale = checkpoint_name((packed, scale), LEVELS)
    trits = _unpack(packed, w.shape[axis], axis, _shards(placement, axis))
    return TernaryTensor(trits, scale, group, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_float(w: jax.Array, placement: Placement, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gather a sharded matrix for the computation as floats.

    The matrix moves in `dtype` and returns to its own dtype. The gradient moves without a cast, so it is summed over
    devices in the dtype of `w`.
    """
    return placement.place(w.astype(dtype)).astype(w.dtype)


def _gather_forward(w: jax.Array, placement: Placement, dtype: Any) -> tuple[jax.Array, None]:
    return gather_float(w, placement, dtype), None


def _gather_backward(placement: Placement, dtype: Any, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (placement.place_back(gradient),)


gather_float.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def look_up(
    table: jax.Array,
    index: jax.Array,
    quantizer: Quantizer | None,
    placement: Placement,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Look up rows of a sharded latent embedding table.

    A quantized table moves packed, and only the selected rows are unpacked. The gradient of the table is accumulated in
    the table's own dtype, because one token may occur thousands of times.

    Args:
      table: latent weights (V, W).
      index: row numbers, integers (...).
      quantizer: one with a straight-through gradient and without noise; None leaves the rows float.
      placement: shardings of the table.
      dtype: dtype of the result.

    Returns:
      Weights (..., W) in `dtype`.
    """
    if quantizer is None:
        return placement.place(table.astype(dtype))[index]
    packed, scale, group = _moved(table, quantizer, -1, None, None, placement, dtype)
    trits = _unpack(packed[index], table.shape[-1], -1, 1)
    return TernaryTensor(trits, jnp.take(scale, index, axis=0, mode="clip"), group, -1).dequantize(dtype)


def _look_up_forward(
    table: jax.Array, index: jax.Array, quantizer: Quantizer | None, placement: Placement, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    like = jnp.zeros((table.shape[0], 0), table.dtype)
    return look_up(table, index, quantizer, placement, dtype), (like, index)


def _look_up_backward(
    quantizer: Quantizer | None, placement: Placement, dtype: Any, residuals: Any, gradient: jax.Array
) -> tuple[jax.Array, None]:
    like, index = residuals
    zeros = jnp.zeros((len(like), gradient.shape[-1]), like.dtype)
    # Constrained to compute_spec first: in param_spec, a device would need all activations to compute its rows.
    added = _constrain(zeros.at[index].add(gradient.astype(like.dtype)), placement.compute_spec)
    return placement.place_back(added), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _moved(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int,
    alpha: jax.Array | None,
    key: jax.Array | None,
    placement: Placement,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, int]:
    """Packed trits and scales, sharded as `compute_spec`, and the group size."""
    own = ternarize(_constrain(w, placement.param_spec), quantizer, axis, alpha, key)
    narrow = jnp.bfloat16 if quantizer.scale_bits == 8 else jnp.float32
    scale = own.scale.astype(min(narrow, jnp.dtype(dtype), key=lambda each: jnp.dtype(each).itemsize))
    return placement.place(_pack(own.trits, axis, _shards(placement, axis))), placement.place(scale), own.group


def _pack(trits: jax.Array, axis: int, shards: int) -> jax.Array:
    """Pack four trits into a byte along `axis`, within each shard: those a quarter of the shard apart share a byte."""
    axis %= trits.ndim
    length = trits.shape[axis] // shards
    split = trits.reshape(*trits.shape[:axis], shards, length, *trits.shape[axis + 1 :])
    split = jnp.pad(split, [(0, -length % 4 if i == axis + 1 else 0) for i in range(split.ndim)])
    packed = join_2bit(jnp.split(split, 4, axis=axis + 1))
    return packed.reshape(*trits.shape[:axis], -1, *trits.shape[axis + 1 :])


def _unpack(packed: jax.Array, length: int, axis: int, shards: int) -> jax.Array:
    """Undo `_pack`: int8 trits, `length` along `axis`."""
    axis %= packed.ndim
    split = packed.reshape(*packed.shape[:axis], shards, -1, *packed.shape[axis + 1 :])
    trits = jax.lax.slice_in_dim(jnp.concatenate(split_2bit(split), axis=axis + 1), 0, length // shards, axis=axis + 1)
    return trits.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def _shards(placement: Placement, axis: int) -> int:
    """Number of shards of the input axis, which `param_spec` and `compute_spec` shard alike."""
    names = placement.param_spec[axis]
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if names is None else mesh.shape[names]


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    fitting = (names if size > 1 else None for names, size in zip(spec, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))
