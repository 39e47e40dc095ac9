"""Fused self-attention for TPUs, forward and backward: scores and weights of the softmax stay in VMEM.

A grid step computes some heads of some rows of the batch, with all tokens at once, so the softmax needs no second pass
and the backward pass needs only queries, keys and values. The kernels read the fused projection (B, T, 3 · D) as it is,
in blocks of whole tiles of 128 lanes. A head that shares its tiles with others is selected by a mask: products with
zeros in the other lanes cost the matrix unit nothing, because it pads them anyway.

The kernels are compiled ahead of time for v4, v5e, v5p, v6e and TPU7x, and tested in Pallas' interpreter. They have not
run on a TPU yet.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tclip_jax.ternary.kernels.layout import DEVICES, LANES, SMALLEST, SUBLANES, padded
from tclip_jax.ternary.tensor import traced_device

# Tokens of a grid step, which amortize its fixed cost; more rows would only take VMEM.
_TOKENS = 1024
_UNROLLED = 4  # heads of a grid step up to which their loop is unrolled


def unsupported(tokens: int, heads: int, head_width: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Return None if the kernels can take these shapes on the device in force, otherwise the reason as one clause."""
    width, columns = heads * head_width, math.lcm(head_width, LANES)
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"queries are bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if width % columns:
        return f"{heads} heads of {head_width} channels do not fill whole blocks of {columns} lanes"
    device = DEVICES.get(traced_device()[0], SMALLEST)
    needed = _vmem(1, tokens, width, columns, jnp.dtype(dtype).itemsize)
    if needed > device.vmem:
        return f"{tokens} tokens of width {width} take {needed / 2**20:.0f} of {device.vmem / 2**20:.0f} MiB of VMEM"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def fused_attention(qkv: jax.Array, head_width: int, causal: bool, interpret: bool = False) -> jax.Array:
    """Compute softmax(q · kᵀ / √K) · v of each head on one device, with the softmax in float32.

    Args:
      qkv: queries, keys and values (B, T, 3 · D), bfloat16 or float32; `unsupported` has the shapes that it takes.
      head_width: K, the channels of a head.
      causal: whether a token attends only to itself and earlier tokens.
      interpret: run as plain JAX on any device.

    Returns:
      (B, T, D) in the dtype of `qkv`.
    """
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    grid, blocks, _ = _blocks(qkv, head_width)
    return pl.pallas_call(
        functools.partial(_forward, head_width=head_width, causal=causal),
        grid=grid,
        in_specs=blocks,
        out_specs=blocks[0],
        out_shape=jax.ShapeDtypeStruct((batch, tokens, width), qkv.dtype),
        compiler_params=_params(),
        interpret=interpret,
        name="attention",
    )(qkv, qkv, qkv)


def _fused_forward(qkv: jax.Array, head_width: int, causal: bool, interpret: bool) -> tuple[jax.Array, jax.Array]:
    return fused_attention(qkv, head_width, causal, interpret), qkv


def _fused_backward(
    head_width: int, causal: bool, interpret: bool, qkv: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    grid, blocks, whole = _blocks(qkv, head_width)
    return (
        pl.pallas_call(
            functools.partial(_backward, head_width=head_width, causal=causal),
            grid=grid,
            in_specs=[*blocks, blocks[0]],
            # All columns of a row stay in VMEM while the grid visits them, and are written once.
            out_specs=whole,
            out_shape=jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            compiler_params=_params(),
            interpret=interpret,
            name="attention_gradient",
        )(qkv, qkv, qkv, gradient.astype(qkv.dtype)),
    )


fused_attention.defvjp(_fused_forward, _fused_backward)


def _blocks(qkv: jax.Array, head_width: int) -> tuple[tuple[int, int], list[pl.BlockSpec], pl.BlockSpec]:
    """Return the grid over rows and columns, the blocks of queries, keys and values, and the block of all of them."""
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    columns = math.lcm(head_width, LANES)
    limit = DEVICES.get(traced_device()[0], SMALLEST).vmem
    rows = max(
        rows
        for rows in range(1, max(min(batch, _TOKENS // tokens), 1) + 1)
        if batch % rows == 0 and (rows == 1 or _vmem(rows, tokens, width, columns, qkv.dtype.itemsize) <= limit)
    )
    steps = width // columns

    def part(i: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, tokens, columns), lambda row, column: (row, 0, column + i * steps))

    whole = pl.BlockSpec((rows, tokens, 3 * width), lambda row, column: (row, 0, 0))
    return (batch // rows, steps), [part(0), part(1), part(2)], whole


def _vmem(rows: int, tokens: int, width: int, columns: int, itemsize: int) -> int:
    """Bytes of VMEM of the backward pass: its blocks twice, for the pipeline, and arrays of tokens x tokens in float32.

    The compiler keeps up to four of these arrays for each unrolled head; two heads overlap.
    """
    height = padded(tokens, SUBLANES * 4 // itemsize)
    blocks = 2 * rows * height * (4 * columns + 3 * width) * itemsize
    return blocks + 6 * 4 * padded(tokens, SUBLANES) * padded(tokens, LANES)


def _params() -> pltpu.CompilerParams:
    limit = DEVICES.get(traced_device()[0], SMALLEST).vmem
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=limit)


def _forward(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, head_width: int, causal: bool) -> None:
    def head(row: Any, window: Any, own: jax.Array | None) -> None:
        q, k, v = q_ref[row, :, window], k_ref[row, :, window], v_ref[row, :, window]
        weights, total = _softmax(_select(own, q), k, head_width, causal)
        mixed = (_dot(weights.astype(v.dtype), v, 1, 0) / total).astype(out_ref.dtype)
        out_ref[row, :, window] = mixed if own is None else jnp.where(own, mixed, out_ref[row, :, window])

    _for_heads(head, q_ref.shape, head_width)


def _backward(
    q_ref: Any, k_ref: Any, v_ref: Any, gradient_ref: Any, out_ref: Any, *, head_width: int, causal: bool
) -> None:
    width, first = out_ref.shape[2] // 3, pl.program_id(1) * q_ref.shape[2]

    def head(row: Any, window: Any, own: jax.Array | None) -> None:
        q, k, v, gradient = (ref[row, :, window] for ref in (q_ref, k_ref, v_ref, gradient_ref))
        weights, total = _softmax(_select(own, q), k, head_width, causal)
        weights /= total
        to_v = _dot(weights.astype(v.dtype), gradient, 0, 0)
        to_weights = _dot(_select(own, gradient), v, 1, 1)
        to_logits = weights * (to_weights - jnp.sum(weights * to_weights, axis=1, keepdims=True))
        to_logits = (to_logits * head_width**-0.5).astype(q.dtype)
        parts = (_dot(to_logits, k, 1, 0), _dot(to_logits, q, 0, 0), to_v)
        for i, part in enumerate(parts):
            start = i * width + first + window.start
            place = pl.ds(pl.multiple_of(start, LANES), window.size)
            part = part.astype(out_ref.dtype)
            out_ref[row, :, place] = part if own is None else jnp.where(own, part, out_ref[row, :, place])

    _for_heads(head, q_ref.shape, head_width)


def _for_heads(head: Any, shape: tuple[int, ...], head_width: int) -> None:
    """Call `head(row, window, own)` for each row of a block (rows, T, C) and each of its heads.

    `window` is the tiles of lanes that contain the head; `own` (T, window) selects its lanes, None if it has them all.
    """
    rows, tokens, columns = shape
    heads = columns // head_width
    alone = head_width % LANES == 0
    size = head_width if alone else LANES if LANES % head_width == 0 else padded(head_width, LANES) + LANES

    def of_row(row: Any, _: None) -> None:
        def of_head(i: Any, _: None) -> None:
            start = pl.multiple_of(jnp.minimum(i * head_width // LANES * LANES, columns - size), LANES)
            lane = jax.lax.broadcasted_iota(jnp.int32, (tokens, size), 1) + start - i * head_width
            head(row, pl.ds(start, size), None if alone else (lane >= 0) & (lane < head_width))

        jax.lax.fori_loop(0, heads, of_head, None, unroll=heads <= _UNROLLED)

    jax.lax.fori_loop(0, rows, of_row, None)


def _select(own: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if own is None else jnp.where(own, x, jnp.zeros_like(x))


def _softmax(q: jax.Array, k: jax.Array, head_width: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Return the weights of the softmax before their division, float32 (T, T), and their sums (T, 1)."""
    logits = _dot(q, k, 1, 1) * head_width**-0.5
    if causal:
        query, key = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(query >= key, logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights, weights.sum(axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The float32 product of two matrices along these axes, with the precision of `jax.default_matmul_precision`."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
