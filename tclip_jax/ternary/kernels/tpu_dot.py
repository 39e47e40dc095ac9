"""The Pallas TPU kernel: activations times packed ternary words, which it unpacks once for each block of columns."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tclip_jax.ternary.kernels.layout import BLOCK, FEW_ROWS, Device, Order, block_sizes, unpack_step


def tpu_dot(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    token_scale: jax.Array | None = None,
    *,
    order: Order,
    group: int,
    out_dtype: jax.typing.DTypeLike,
    device: Device,
    interpret: bool = False,
) -> jax.Array:
    """Compute x · ŵ in one kernel call, accumulated in float32 or int32.

    The grid iterates over blocks of columns, then over blocks of rows; one dot takes all of K. At its first block of
    rows the kernel unpacks the words of a block of columns into VMEM. Group scales are folded into bf16 or float32
    weights at that point. With int8 weights, or few rows, the kernel scales the sum of each group in float32 instead. A
    single scale is applied to the sum. The last block may extend beyond M and N.

    Args:
      x: (M, K), int8 for the int8 order, otherwise bfloat16 or float32 (six bf16 passes); K is padded by `spread`.
      words: int32 (K / 16, N) from `pack_words`.
      scale: float32 (G, N), divided by the order's factor.
      token_scale: float32 (M, 1) that multiplies the rows of the result, or None.
      order: order of the words.
      group: number of packed weights along K from one scale to the next.
      out_dtype: dtype of the result.
      device: its VMEM and largest blocks.
      interpret: run as plain JAX on any device.

    Returns:
      (M, N) in `out_dtype`.
    """
    (m, k), n = x.shape, words.shape[1]
    fold = order == "bf16" and scale.shape[0] > 1 and (x.dtype == jnp.float32 or m > FEW_ROWS or group % BLOCK > 0)
    rows, columns = block_sizes(device, m, k, n, x.dtype.itemsize, jnp.dtype(out_dtype).itemsize)
    tokens = [] if token_scale is None else [token_scale]
    return pl.pallas_call(
        functools.partial(_kernel, order=order, group=group, fold=fold),
        grid=(pl.cdiv(n, columns), pl.cdiv(m, rows)),
        in_specs=[
            pl.BlockSpec((rows, k), lambda j, i: (i, 0)),
            pl.BlockSpec((k // 16, columns), lambda j, i: (0, j)),
            pl.BlockSpec((scale.shape[0], columns), lambda j, i: (0, j)),
            *[pl.BlockSpec((rows, 1), lambda j, i: (i, 0)) for _ in tokens],
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        scratch_shapes=[pltpu.VMEM((k, columns), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=device.vmem
        ),
        interpret=interpret,
        name=f"ternary_{order}",
    )(x, words, scale, *tokens)


def _kernel(x_ref: Any, words_ref: Any, scale_ref: Any, *refs: Any, order: Order, group: int, fold: bool) -> None:
    *token_ref, out_ref, weight_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        _unpack(words_ref, scale_ref, weight_ref, order=order, group=group, fold=fold)

    k, sums = x_ref.shape[1], 1 if fold else scale_ref.shape[0]
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for j in range(sums):
        own = pl.ds(j * group, min(group, k - j * group)) if sums > 1 else pl.ds(0, k)
        # An int32 holds 127 · 64 · K for K up to 264,000.
        part = jax.lax.dot(
            x_ref[:, own],
            weight_ref[own, :],
            precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
            preferred_element_type=jnp.int32 if x_ref.dtype == jnp.int8 else jnp.float32,
        ).astype(jnp.float32)
        total += part if fold else part * scale_ref[pl.ds(j, 1), :]
    for ref in token_ref:
        total *= ref[...]
    out_ref[...] = total.astype(out_ref.dtype)


def _unpack(words_ref: Any, scale_ref: Any, weight_ref: Any, *, order: Order, group: int, fold: bool) -> None:
    """Unpack words to weights in VMEM, 128 k at a time; with `fold`, multiply them by the scales of their groups."""
    steps, lane = (8, jnp.bfloat16) if order == "bf16" else (4, jnp.int8)
    length = BLOCK // steps

    def block(g: jax.Array, carry: None) -> None:
        words = words_ref[pl.ds(pl.multiple_of(8 * g, 8), 8), :]
        for i in range(steps):
            start = pl.multiple_of(BLOCK * g + length * i, length)
            weights = pltpu.bitcast(unpack_step(words, i, order), lane)
            if fold:
                # The padding of K lies beyond the last group.
                own = jnp.minimum(start // group, scale_ref.shape[0] - 1)
                weights = weights.astype(jnp.float32) * scale_ref[pl.ds(own, 1), :]
            weight_ref[pl.ds(start, length), :] = weights.astype(weight_ref.dtype)

    jax.lax.fori_loop(0, weight_ref.shape[0] // BLOCK, block, None)
