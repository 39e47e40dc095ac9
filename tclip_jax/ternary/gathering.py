"""All-gather of sharded weights, as packed trits and scales or as floats.

Every device quantizes its own shard and sends two bits a weight and the scales. Sharding is that of the mesh in force;
the gathered weights are equal to the bit to those that a single device computes.
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

# What `checkpoint_name` calls all that quantized weights follow from: scales, thresholds and packed trits.
LEVELS = "levels"


class Placement(NamedTuple):
    """How a matrix (K, N) is sharded over the mesh in force where it is stored, and where it is used.

    A gradient goes the other way.
    """

    param_spec: PartitionSpec
    compute_spec: PartitionSpec

    def place(self, x: jax.Array) -> jax.Array:
        """From how it is stored to how it is used; an axis of one entry is not sharded."""
        return _constrain(_constrain(x, self.param_spec), self.compute_spec)

    def place_back(self, x: jax.Array) -> jax.Array:
        """To how it is stored; a sum over devices is added up there (a reduce-scatter), and not on each of them."""
        return _constrain(x, self.param_spec)


def gather_ternary(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int,
    alpha: jax.Array | None,
    placement: Placement,
    dtype: jax.typing.DTypeLike,
) -> TernaryTensor:
    """The trits and scales of the latent `w` (K, N) where they are used; scales in `dtype`, or bfloat16 where exact.

    Arguments are those of `ternarize`.
    """
    packed, scale, group = _moved(w, quantizer, axis, alpha, placement, dtype)
    packed, scale = checkpoint_name((packed, scale), LEVELS)
    trits = _unpack(packed, w.shape[axis], axis, _shards(placement, axis))
    return TernaryTensor(trits, scale, group, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_float(w: jax.Array, placement: Placement, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The matrix `w` where it is used: it moves in `dtype`, and its gradient as it is, to be summed in that of `w`."""
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
    """Rows of a latent table (V, W) in `dtype`, quantized by one whose scale is not learned, or as they are.

    The table moves packed, and only the rows that are looked up are unpacked. Its gradient is added up in the table's
    own dtype: one token may come thousands of times.
    """
    if quantizer is None:
        return placement.place(table.astype(dtype))[index]
    packed, scale, group = _moved(table, quantizer, -1, None, placement, dtype)
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
    # Used first: for its own rows alone a device would need the activations of all.
    added = _constrain(zeros.at[index].add(gradient.astype(like.dtype)), placement.compute_spec)
    return placement.place_back(added), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def _moved(
    w: jax.Array, quantizer: Quantizer, axis: int, alpha: jax.Array | None, placement: Placement, dtype: Any
) -> tuple[jax.Array, jax.Array, int]:
    """Packed trits and scales where they are used, and the length of a group."""
    own = ternarize(_constrain(w, placement.param_spec), quantizer, axis, alpha)
    narrow = jnp.bfloat16 if quantizer.scale_bits == 8 else jnp.float32
    scale = own.scale.astype(min(narrow, jnp.dtype(dtype), key=lambda each: jnp.dtype(each).itemsize))
    return placement.place(_pack(own.trits, axis, _shards(placement, axis))), placement.place(scale), own.group


def _pack(trits: jax.Array, axis: int, shards: int) -> jax.Array:
    """Four trits a byte along `axis`, within each of its shards: those a quarter of the shard apart share one."""
    axis %= trits.ndim
    length = trits.shape[axis] // shards
    split = trits.reshape(*trits.shape[:axis], shards, length, *trits.shape[axis + 1 :])
    split = jnp.pad(split, [(0, -length % 4 if i == axis + 1 else 0) for i in range(split.ndim)])
    packed = join_2bit(jnp.split(split, 4, axis=axis + 1))
    return packed.reshape(*trits.shape[:axis], -1, *trits.shape[axis + 1 :])


def _unpack(packed: jax.Array, length: int, axis: int, shards: int) -> jax.Array:
    """The int8 trits of `_pack`, `length` along `axis`."""
    axis %= packed.ndim
    split = packed.reshape(*packed.shape[:axis], shards, -1, *packed.shape[axis + 1 :])
    trits = jax.lax.slice_in_dim(jnp.concatenate(split_2bit(split), axis=axis + 1), 0, length // shards, axis=axis + 1)
    return trits.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def _shards(placement: Placement, axis: int) -> int:
    """Over how many devices the input axis is both stored and used."""
    names = placement.param_spec[axis]
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if names is None else mesh.shape[names]


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    fitting = (names if size > 1 else None for names, size in zip(spec, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))
