"""Trits in 32-bit words, in the orders from which a shift and a mask give a TPU its bf16 or int8 weights.

A word holds sixteen 2-bit two's-complement fields of one column. A field at the top of a lane is, without further
arithmetic, 2t as a bfloat16 (0x0000, 0x4000, 0xC000) and 64t as an int8 (0, 64, −64); the factors 1/2 and 1/64 go into
the scale. 128 consecutive k fill 8 words, the sublanes of one int32 tile, so that each of 8 (bf16) or 4 (int8) steps
gives whole (16, 128) or (32, 128) tiles in the order of k.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels import k_axis
from tclip_jax.ternary.packed import PackedTensor
from tclip_jax.ternary.tensor import TernaryTensor, expand_scale

Order = Literal["bf16", "int8"]

BLOCK = 128  # k in 8 words of 16 fields
_LANES = {"bf16": 2, "int8": 4}  # in a word
_FACTOR = {"bf16": 2, "int8": 64}  # what an unpacked trit is multiplied by
# Groups are padded to whole tiles where they are scaled one by one, to whole steps where they are folded at unpack.
GRANULE = {"bf16": 16, "int8": BLOCK}


def pack_words(trits: jax.Array, order: Order) -> jax.Array:
    """int8 trits (..., K, N), K a multiple of 128, to int32 words (..., K / 16, N).

    With L lanes in a word (bf16 2, int8 4) and S = 16 / L steps, k = 128 g + 8 L i + L r + h of step i is the field
    S h + S − 1 − i of word 8 g + r.
    """
    *layers, length, columns = trits.shape
    fields = (trits.astype(jnp.uint32) & 3).reshape(*layers, -1, 16 // _LANES[order], 8, _LANES[order], columns)
    # No two fields overlap: the sum is an or.
    words = (fields << _shifts(order)).sum(axis=(-4, -2), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(*layers, length // 16, columns)


def unpack_words(words: jax.Array, order: Order) -> jax.Array:
    """The int8 trits of `pack_words`."""
    *layers, rows, columns = words.shape
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(*layers, -1, 1, 8, 1, columns)
    # Shifted to the top of an int8, the sign comes back with an arithmetic shift.
    fields = ((blocks >> _shifts(order)).astype(jnp.uint8) << 6).astype(jnp.int8) >> 6
    return fields.reshape(*layers, 16 * rows, columns)


def unpack_step(words: jax.Array, i: int, order: Order) -> jax.Array:
    """Step i of a block inside the kernel: int32 whose lanes are 2t as bfloat16 or 64t as int8, still to be bitcast."""
    mask = {"bf16": 0xC000C000, "int8": 0xC0C0C0C0}[order]
    return jax.lax.shift_left(words, jnp.int32(2 * i)) & jnp.int32(mask - (1 << 32))


def _shifts(order: Order) -> jax.Array:
    """Bits below each field: uint32 (steps, 1, lanes, 1)."""
    steps = 16 // _LANES[order]
    i, h = jnp.arange(steps, dtype=jnp.uint32)[:, None, None, None], jnp.arange(_LANES[order], dtype=jnp.uint32)
    return 2 * (steps * h[:, None] + steps - 1 - i)


@functools.partial(jax.jit, static_argnames=("order", "layout"))
def pack(w: TernaryTensor, order: Order, layout: str) -> PackedTensor:
    """Words (…, K′ / 16, N′) and float32 scales (…, G, N′) without the order's factor; N′ is a multiple of 128."""
    trits = k_axis.pad(k_axis.spread(w.trits, w.group, GRANULE[order], BLOCK, -2), 128, -1)
    scale = jnp.broadcast_to(w.scale, (*w.scale.shape[:-1], w.shape[-1])).astype(jnp.float32) / _FACTOR[order]
    shape = (w.shape[-2], w.shape[-1])
    return PackedTensor(pack_words(trits, order), k_axis.pad(scale, 128, -1), shape, w.group, layout)


@functools.partial(jax.jit, static_argnames="order")
def unpack(w: PackedTensor, order: Order) -> jax.Array:
    """The float32 weights (…, K, N)."""
    trits = k_axis.gather(unpack_words(w.data, order), w.shape[0], w.group, GRANULE[order])
    return (trits * expand_scale(w.scale * _FACTOR[order], w.group, w.shape[0], -2))[..., : w.shape[1]]
