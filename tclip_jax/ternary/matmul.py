"""The product of activations with a ternary weight, and which implementation computes it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from tclip_jax.ternary.kernels import PREFERRED, kernel, reference
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, check_floating, traced_device

VARIABLE = "TCLIP_IMPLEMENTATION"

_logger = logging.getLogger(__name__)


def ternary_matmul(
    x: jax.Array,
    w: TernaryTensor | PackedTensor,
    *,
    activations: Activations | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x · ŵ in the dtype of `x`: (..., K) with a (K, N) ternary weight gives (..., N), accumulated in float32.

    A `PackedTensor` is multiplied by the implementation that it is packed for. A `TernaryTensor` is dequantized and
    multiplied, bit-equal to the fake-quantized product of training, unless an implementation is named here or by the
    variable TCLIP_IMPLEMENTATION: packing costs more than a product, so `repack` it once.

    Works under jax.jit, jax.vmap and a mesh (rows stay sharded, a packed weight is gathered), and has a gradient to x.

    Args:
      x: floats; NaN and infinity give NaN or infinity in their rows.
      w: one layer's weight; its scales are not differentiated.
      activations: "A16" multiplies x as it is; "A8" rounds it to int8 first, with a scale max|x| / 127 for each token,
        and has the gradient of the product without rounding (straight-through). None: what the weight is packed for,
        "A16" of a `TernaryTensor`.
      implementation: one of `kernels.NAMES`.

    Raises:
      TypeError: integers or bools for x, which would cut the product to integers.
      ValueError: an implementation that does not exist, cannot run here, or is not the one that `w` is packed for; or
        another K of x than of w.
    """
    x = jnp.asarray(x)
    check_floating("x", x.dtype)
    length = w.shape[0] if isinstance(w, PackedTensor) else w.shape[-2]
    if not x.ndim or x.shape[-1] != length:
        raise ValueError(f"x is {x.shape}: its last axis must be the {length} inputs of the weight {tuple(w.shape)}")
    if isinstance(w, PackedTensor):
        if implementation not in (None, w.layout):
            raise ValueError(f"the weight is packed for {w.layout!r}, not for {implementation!r}: repack it from trits")
        packed, activations = w, activations or w.activations
    else:
        activations = activations or "A16"
        forced = implementation or os.environ.get(VARIABLE)
        if forced in (None, reference.NAME):
            return reference.multiply(x, w.dequantize(x.dtype), activations)
        rows = math.prod(x.shape[:-1])
        packed = repack(w, rows=rows, dtype=x.dtype, activations=activations, implementation=forced)
    return _product(x.reshape(-1, x.shape[-1]), packed, activations).reshape(*x.shape[:-1], packed.shape[1])


def repack(
    w: TernaryTensor,
    *,
    rows: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    activations: Activations = "A16",
    implementation: str | None = None,
) -> PackedTensor:
    """The weight in the order of the implementation that `choose` picks; leading layer axes are kept.

    Raises:
      TypeError: trits that are not integers.
      ValueError: what `choose` raises.
    """
    if not jnp.issubdtype(w.trits.dtype, jnp.integer):
        raise TypeError(f"trits are {w.trits.dtype}: they must be integers −1, 0 and +1")
    shape = (w.shape[-2], w.shape[-1])
    name = choose(shape, w.group, rows=rows, dtype=dtype, activations=activations, implementation=implementation)
    return dataclasses.replace(kernel(name).pack(w), activations=activations)


def choose(
    shape: tuple[int, int],
    group: int,
    *,
    rows: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    activations: Activations = "A16",
    implementation: str | None = None,
) -> str:
    """The name of the implementation for a (K, N) weight: of shapes and the kind of device alone, nothing is tried.

    The device is that of the mesh in force, else jax's default. A choice and its reason are logged once, whatever the
    shapes.

    Args:
      shape: (K, N).
      group: weights along K that share a scale.
      rows: of x; None when not known yet.
      dtype: of x.
      activations: "A16" or "A8".
      implementation: forces one; else the variable TCLIP_IMPLEMENTATION does, read when a function is traced.

    Raises:
      TypeError: a dtype that is not floating.
      ValueError: the forced one does not exist or cannot run, with the reason.
    """
    check_floating("x", dtype)
    kind, platform = traced_device()
    given: dict[str, Any] = {
        "device_kind": kind,
        "platform": platform,
        "rows": rows,
        "shape": shape,
        "group": group,
        "dtype": jnp.dtype(dtype),
        "activations": activations,
    }
    where = f"{kind}, {activations} {jnp.dtype(dtype).name}"
    size = f"M={'any' if rows is None else rows} K={shape[0]} N={shape[1]}"
    forced = implementation or os.environ.get(VARIABLE)
    if forced:
        reason = kernel(forced).unsupported(**given)
        if reason:
            raise ValueError(f"implementation {forced!r} cannot serve {where}, {size}: {reason}")
        _log(where, forced, "it was asked for")
        return forced
    passed_over: list[str] = []
    for name in PREFERRED.get(platform, ()):
        reason = kernel(name).unsupported(**given) or kernel(name).slower(**given)
        if not reason:
            _log(where, name, "; ".join(passed_over) or "the first choice on this platform")
            return name
        passed_over.append(f"not {name}: {reason}")
    _log(where, reference.NAME, "; ".join(passed_over) or f"no other is for platform {platform}")
    return reference.NAME


@functools.cache
def _log(where: str, name: str, reason: str) -> None:
    _logger.info("ternary product (%s): %s (%s)", where, name, reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: PackedTensor, activations: Activations) -> jax.Array:
    return _batchable(activations)(x, w)


def _product_forward(x: jax.Array, w: PackedTensor, activations: Activations) -> tuple[jax.Array, PackedTensor]:
    return _product(x, w, activations), w


def _product_backward(activations: Activations, w: PackedTensor, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient @ kernel(w.layout).unpack(w).astype(gradient.dtype).T, None


_product.defvjp(_product_forward, _product_backward)


@functools.cache
def _batchable(activations: Activations) -> Any:
    """The product of (M, K) with one weight, whose vmap over x makes more rows of one product."""

    @custom_vmap
    def product(x: jax.Array, w: PackedTensor) -> jax.Array:
        return _sharded(x, w, activations)

    @product.def_vmap
    def batched(size: int, is_batched: Any, x: jax.Array, w: PackedTensor) -> tuple[jax.Array, bool]:
        x_batched, w_batched = is_batched
        if not any(jax.tree.leaves(w_batched)):
            return product(x.reshape(-1, x.shape[-1]), w).reshape(size, x.shape[1], w.shape[1]), True

        def one(i: jax.Array) -> jax.Array:
            own = [jnp.asarray(leaf)[i] if mapped else leaf for leaf, mapped in zip(leaves, flags, strict=True)]
            return product(*jax.tree.unflatten(structure, own))

        leaves, structure = jax.tree.flatten((x, w))
        flags = jax.tree.leaves((x_batched, w_batched))
        return jax.lax.map(one, jnp.arange(size)), True

    return product


def _sharded(x: jax.Array, w: PackedTensor, activations: Activations) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return kernel(w.layout).matmul(x, w, activations=activations)
    if traced_device()[1] == "tpu":
        return _over_all_devices(x, w, activations, mesh)
    static = (w.shape, w.group, w.layout, w.data.ndim, w.scale.ndim, activations)
    return _partitioned(*static)(x, w.data, w.scale)


def _over_all_devices(x: jax.Array, w: PackedTensor, activations: Activations, mesh: AbstractMesh) -> jax.Array:
    """A product whose rows are spread over all devices, or repeated on each where they do not divide evenly.

    XLA for TPUs has no custom partitioning (https://github.com/jax-ml/jax/issues/38196).
    """
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual)
    even = x.shape[0] % math.prod(mesh.shape[name] for name in axes) == 0
    rows = PartitionSpec(axes) if even else PartitionSpec()
    return jax.shard_map(
        lambda x, w: kernel(w.layout).matmul(x, w, activations=activations),
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        axis_names=set(axes),
        check_vma=False,
    )(x, w)


@functools.cache
def _partitioned(
    shape: tuple[int, int], group: int, layout: str, data_axes: int, scale_axes: int, activations: Activations
) -> Any:
    """A product that the partitioner of XLA takes apart by rows of x, each device with the whole packed weight."""

    def local(x: jax.Array, data: jax.Array, scale: jax.Array) -> jax.Array:
        w = PackedTensor(data, scale, shape, group, layout)
        return kernel(layout).matmul(x, w, activations=activations)

    def rows_and_whole(mesh: Any, arguments: Any) -> tuple[NamedSharding, NamedSharding]:
        rows = arguments[0].sharding.spec[:1]
        return NamedSharding(mesh, PartitionSpec(*rows, None)), NamedSharding(mesh, PartitionSpec())

    def partition(mesh: Any, arguments: Any, result: Any) -> Any:
        rows, whole = rows_and_whole(mesh, arguments)
        return mesh, local, rows, (rows, whole, whole)

    product = custom_partitioning(local)
    factors = iter("abcdefgh")
    data, scale = (" ".join(next(factors) for _ in range(axes)) for axes in (data_axes, scale_axes))
    product.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arguments, result: rows_and_whole(mesh, arguments)[0],
        sharding_rule=f"m k, {data}, {scale} -> m n",
    )
    return product
