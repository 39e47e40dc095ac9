"""All-gather of sharded weights, as packed integers and scales or as floats.

Each device quantizes its own shard and sends 2-bit trits, or integers of 4 or 8 bits, and scales. Shardings refer to
the mesh in force (`jax.set_mesh`). The gathered weights are bit-identical to those that a single device computes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tclip_jax.ternary.packing import join_fields, split_fields
from tclip_jax.ternary.quantizers import Quantizer, find_integers
from tclip_jax.ternary.tensor import TernaryTensor
from tclip_jax.ternary.uniform import dequantize_integers

# `checkpoint_name` of the values that determine quantized weights: scales, thresholds and packed integers.
LEVELS = "levels"


class Placement(NamedTuple):
    """Shardings of a matrix (K, N) over the mesh in force: as a parameter and in the computation.

    Weights move from `param_spec` to `compute_spec`, gradients move back.

    Attributes:
      param_spec: sharding of the stored parameter.
      compute_spec: sharding of the operand of a product.
      rows: mesh axes over which the rows of activations are sharded, where they are known.
    """

    param_spec: PartitionSpec
    compute_spec: PartitionSpec
    rows: tuple[str, ...] = ()

    @jax.named_scope("gather")
    def place(self, x: jax.Array) -> jax.Array:
        """Reshard from `param_spec` to `compute_spec`; an axis of size 1 stays unsharded."""
        return _constrain(_constrain(x, self.param_spec), self.compute_spec)

    def place_back(self, x: jax.Array) -> jax.Array:
        """Reshard to `param_spec`, so that a sum over devices is a reduce-scatter and not an all-reduce."""
        return _constrain(x, self.param_spec)


def gather_quantized(
    w: jax.Array,
    quantizer: Quantizer,
    axis: int,
    alpha: jax.Array | None,
    key: jax.Array | None,
    placement: Placement,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Quantize each shard of a matrix, gather the integers and scales for the computation, and dequantize them.

    Args:
      w: latent weights (K, N), sharded as `placement.param_spec`.
      quantizer: as in `quantize`.
      axis: as in `quantize`.
      alpha: as in `quantize`.
      key: as in `quantize`.
      placement: shardings of `w`.
      dtype: dtype of the result. Scales of 8 significant bits move as bfloat16 if that is not wider than `dtype`.

    Returns:
      The weights ŵ in `dtype`, sharded as `placement.compute_spec`.
    """
    packed, scale, group = _moved(w, quantizer, axis, alpha, key, placement, dtype)
    packed, scale = checkpoint_name((packed, scale), LEVELS)
    integers = _unpack(packed, quantizer.stored_bits, w.shape[axis], axis, _shards(placement, axis))
    return _dequantized(integers, scale, quantizer, group, axis, dtype)


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
    with jax.named_scope("quantize"):
        packed, scale, group = _moved(table, quantizer, -1, None, None, placement, dtype)
    integers = _unpack(packed[index], quantizer.stored_bits, table.shape[-1], -1, 1)
    return _dequantized(integers, jnp.take(scale, index, axis=0, mode="clip"), quantizer, group, -1, dtype)


def _look_up_forward(
    table: jax.Array, index: jax.Array, quantizer: Quantizer | None, placement: Placement, dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    like = jnp.zeros((table.shape[0], 0), table.dtype)
    return look_up(table, index, quantizer, placement, dtype), (like, index)


def _look_up_backward(
    quantizer: Quantizer | None, placement: Placement, dtype: Any, residuals: Any, gradient: jax.Array
) -> tuple[jax.Array, None]:
    like, index = residuals

    def add_rows(index: jax.Array, gradient: jax.Array) -> jax.Array:
        zeros = jnp.zeros((len(like), gradient.shape[-1]), like.dtype)
        return zeros.at[index].add(gradient.astype(like.dtype))

    names = placement.param_spec[0]
    stored = (names,) if isinstance(names, str) else names or ()
    shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(shape[name] for name in placement.rows)
    if not set(stored) & set(placement.rows) or len(index) % devices:
        # Constrained to compute_spec first: in param_spec, a device would need all activations to compute its rows.
        return placement.place_back(_constrain(add_rows(index, gradient), placement.compute_spec)), None

    # XLA would all-reduce the whole table. Each device needs the sum of its rows alone.
    def local(index: jax.Array, gradient: jax.Array) -> jax.Array:
        added = add_rows(index, gradient)
        for name in stored:
            if name in placement.rows:
                added = jax.lax.psum_scatter(added, name, scatter_dimension=0, tiled=True)
            else:
                size = len(added) // shape[name]
                added = jax.lax.dynamic_slice_in_dim(added, jax.lax.axis_index(name) * size, size)
        return jax.lax.psum(added, tuple(name for name in placement.rows if name not in stored))

    rows = PartitionSpec(placement.rows)
    table = jax.shard_map(local, in_specs=rows, out_specs=PartitionSpec(names), check_vma=False)(index, gradient)
    return placement.place_back(table), None


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
    """Packed integers and scales, sharded as `compute_spec`, and the group size."""
    integers, own = find_integers(_constrain(w, placement.param_spec), quantizer, axis, alpha, key)
    narrow = jnp.bfloat16 if quantizer.scale_bits == 8 else jnp.float32
    # A trit times a scale is rounded once, whether the scale is narrowed or the product; an integer's product is not.
    dtypes = (narrow,) if quantizer.uniform else (narrow, jnp.dtype(dtype))
    scale = own.scale.astype(min(dtypes, key=lambda each: jnp.dtype(each).itemsize))
    packed = _pack(integers, quantizer.stored_bits, axis, _shards(placement, axis))
    return placement.place(packed), placement.place(scale), own.group


def _dequantized(
    integers: jax.Array, scale: jax.Array, quantizer: Quantizer, group: int, axis: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    if quantizer.uniform:
        return dequantize_integers(integers, scale, group, axis, dtype)
    return TernaryTensor(integers, scale, group, axis).dequantize(dtype)


def _pack(integers: jax.Array, bits: int, axis: int, shards: int) -> jax.Array:
    """Pack 8 / `bits` integers into a byte along `axis`, within each shard.

    Trits that share a byte are a quarter of the shard apart, integers of 4 bits a half.
    """
    axis, many = axis % integers.ndim, 8 // bits
    length = integers.shape[axis] // shards
    split = integers.reshape(*integers.shape[:axis], shards, length, *integers.shape[axis + 1 :])
    split = jnp.pad(split, [(0, -length % many if i == axis + 1 else 0) for i in range(split.ndim)])
    packed = join_fields(jnp.split(split, many, axis=axis + 1), bits)
    return packed.reshape(*integers.shape[:axis], -1, *integers.shape[axis + 1 :])


def _unpack(packed: jax.Array, bits: int, length: int, axis: int, shards: int) -> jax.Array:
    """Undo `_pack`: int8 integers, `length` along `axis`."""
    axis %= packed.ndim
    split = packed.reshape(*packed.shape[:axis], shards, -1, *packed.shape[axis + 1 :])
    fields = jnp.concatenate(split_fields(split, bits), axis=axis + 1)
    integers = jax.lax.slice_in_dim(fields, 0, length // shards, axis=axis + 1)
    return integers.reshape(*packed.shape[:axis], length, *packed.shape[axis + 1 :])


def _shards(placement: Placement, axis: int) -> int:
    """Number of shards of the input axis, which `param_spec` and `compute_spec` shard alike."""
    names = placement.param_spec[axis]
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if names is None else mesh.shape[names]


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    fitting = (names if size > 1 else None for names, size in zip(spec, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*fitting))
