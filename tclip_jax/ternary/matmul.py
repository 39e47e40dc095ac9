"""Matrix products of activations with ternary weights, and the choice of their implementation."""

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

from tclip_jax.ternary import packing
from tclip_jax.ternary.kernels import PREFERRED, kernel, native_cpu, reference
from tclip_jax.ternary.sums import split_groups
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
    """Multiply activations by a ternary weight: x · ŵ, accumulated in float32.

    A `PackedTensor` is multiplied by the implementation that it is packed for. A `TernaryTensor` is dequantized and
    multiplied, bit-identical to the fake-quantized product of training. If `implementation` or the environment variable
    TCLIP_IMPLEMENTATION names an implementation, a `TernaryTensor` is packed for it in each call. Packing takes longer
    than a product, so call `repack` once instead.

    The function works under `jax.jit`, `jax.vmap` and a mesh: rows of `x` stay sharded and a packed weight is gathered.
    It is differentiable with respect to `x`, but not with respect to the scales.

    Args:
      x: floats (..., K). A row with NaN or infinity gives NaN or infinity in its own row of the result.
      w: a ternary weight (K, N) of one layer.
      activations: "A32" multiplies `x` as it is. "A16" first rounds each token of `x` to int16 with the scale max|x| /
        32767, on TPUs and GPUs to bfloat16; "A8" to int8 with max|x| / 127. Their gradients are those of the product
        without rounding (straight-through). None uses the setting of a `PackedTensor`, and "A32" for a `TernaryTensor`.
      implementation: one of `kernels.NAMES`, or None.

    Returns:
      (..., N) in the dtype of `x`.

    Raises:
      TypeError: `x` is an integer or bool array, in which the product would be truncated.
      ValueError: K differs between `x` and `w`; or the implementation is unknown, cannot run on this device, or is not
        the one that `w` is packed for.
    """
    x = jnp.asarray(x)
    check_floating("x", x.dtype)
    shape = w.layer_shape if isinstance(w, PackedTensor) else w.shape
    if not x.ndim or x.shape[-1] != shape[-2]:
        raise ValueError(f"x is {x.shape}: its last axis must be the {shape[-2]} inputs of the weight {tuple(shape)}")
    if isinstance(w, PackedTensor):
        if implementation not in (None, w.layout):
            raise ValueError(f"the weight is packed for {w.layout!r}, not for {implementation!r}: repack it from trits")
        packed, activations = w, activations or w.activations
    else:
        activations = activations or "A32"
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
    activations: Activations = "A32",
    implementation: str | None = None,
) -> PackedTensor:
    """Pack a ternary weight for the implementation that `choose` selects.

    Args:
      w: integer trits (..., K, N) with `axis` −2 and their scales; leading layer axes stay.
      rows: as in `choose`.
      dtype: as in `choose`.
      activations: as in `choose`; the result's default in `ternary_matmul`.
      implementation: as in `choose`.

    Returns:
      The packed weight.

    Raises:
      TypeError: the trits are not integers, or `dtype` is not floating.
      ValueError: the forced implementation is unknown or cannot run; see `choose`.
    """
    if not jnp.issubdtype(w.trits.dtype, jnp.integer):
        raise TypeError(f"trits are {w.trits.dtype}: they must be integers −1, 0 and +1")
    shape = (w.shape[-2], w.shape[-1])
    name = choose(shape, w.group, rows=rows, dtype=dtype, activations=activations, implementation=implementation)
    return dataclasses.replace(kernel(name).pack(w), activations=activations)


def unpack(w: PackedTensor) -> TernaryTensor:
    """Undo `repack` and `pack_rows`.

    Args:
      w: a packed weight, with or without a layer axis, or a packed embedding table.

    Returns:
      Trits (..., K, N) with `axis` −2 and a scale for each group and output, 0 if all trits of the group are 0; or
      trits (V, W) of a table with `axis` −1 and the packed scales.
    """
    if w.layout == packing.LAYOUT:
        trits = packing.unpack_2bit(jnp.asarray(w.data), w.layer_shape[1])
        return TernaryTensor(trits, jnp.asarray(w.scale, jnp.float32), w.group, -1)
    dense = kernel(w.layout).unpack(w)
    scale = split_groups(jnp.abs(dense), min(w.group, w.layer_shape[0]), -2).max(axis=-2)
    return TernaryTensor(jnp.sign(dense).astype(jnp.int8), scale, w.group)


def default_activations(implementation: str | None = None) -> Activations:
    """Return the activations of inference by default: "A16" where its products are twice as fast, otherwise "A32".

    A16 changes embeddings by about 1e-5 (docs/performance.md). It is the default on CPUs with AVX2 or more, if the
    native library was built.

    Args:
      implementation: as in `choose`; implementations other than `native_cpu` have "A32".
    """
    forced = implementation or os.environ.get(VARIABLE)
    if forced not in (None, native_cpu.NAME) or traced_device()[1] != "cpu":
        return "A32"
    return "A16" if native_cpu.best_instructions() in native_cpu.FAST_A16 else "A32"


def choose(
    shape: tuple[int, int],
    group: int,
    *,
    rows: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    activations: Activations = "A32",
    implementation: str | None = None,
) -> str:
    """Choose the implementation of a ternary product from its shapes and the kind of device, without running anything.

    The device is that of the mesh in force, otherwise JAX's default device. Each choice is logged once with its reason,
    whatever the shapes.

    Args:
      shape: (K, N) of the weight.
      group: number of weights along K that share a scale.
      rows: M, the number of rows of `x`; None if it is not known yet.
      dtype: dtype of `x`.
      activations: "A32", "A16" or "A8", see `ternary_matmul`.
      implementation: name of an implementation to force. By default the environment variable TCLIP_IMPLEMENTATION
        forces one; it is read when a function is traced.

    Returns:
      The name of the implementation, one of `kernels.NAMES`.

    Raises:
      TypeError: `dtype` is not floating.
      ValueError: the forced implementation is unknown or cannot run; the message has the reason.
    """
    name, reason = explain_choice(
        shape, group, rows=rows, dtype=dtype, activations=activations, implementation=implementation
    )
    _log(f"{traced_device()[0]}, {activations} {jnp.dtype(dtype).name}", name, reason)
    return name


def explain_choice(
    shape: tuple[int, int],
    group: int,
    *,
    rows: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    activations: Activations = "A32",
    implementation: str | None = None,
) -> tuple[str, str]:
    """Return the implementation that `choose` chooses, and its reason as one clause; logs nothing."""
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
    size = f"M={'any' if rows is None else rows} K={shape[0]} N={shape[1]}"
    forced = implementation or os.environ.get(VARIABLE)
    if forced:
        reason = kernel(forced).unsupported(**given)
        if reason:
            where = f"{kind}, {activations} {jnp.dtype(dtype).name}"
            raise ValueError(f"implementation {forced!r} cannot serve {where}, {size}: {reason}")
        return forced, "forced"
    passed_over: list[str] = []
    for name in PREFERRED.get(platform, ()):
        reason = kernel(name).unsupported(**given) or kernel(name).slower(**given)
        if not reason:
            return name, "; ".join(passed_over) or "the first choice on this platform"
        passed_over.append(f"not {name}: {reason}")
    return reference.NAME, "; ".join(passed_over) or f"no other kernel is for platform {platform}"


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
    """The product of (M, K) with one weight; its vmap over `x` is a single product with more rows."""

    @custom_vmap
    def product(x: jax.Array, w: PackedTensor) -> jax.Array:
        return _sharded(x, w, activations)

    @product.def_vmap
    def batched(size: int, is_batched: Any, x: jax.Array, w: PackedTensor) -> tuple[jax.Array, bool]:
        x_batched, w_batched = is_batched
        if not any(jax.tree.leaves(w_batched)):
            return product(x.reshape(-1, x.shape[-1]), w).reshape(size, x.shape[1], w.layer_shape[1]), True

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
    static = (w.layer_shape, w.group, w.layout, w.data.ndim, w.scale.ndim, activations)
    return _partitioned(*static)(x, w.data, w.scale)


def _over_all_devices(x: jax.Array, w: PackedTensor, activations: Activations, mesh: AbstractMesh) -> jax.Array:
    """The product with its rows sharded over all devices, or replicated if they do not divide evenly.

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
    """The product that XLA partitions by rows of `x`; each device has the whole packed weight."""

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
