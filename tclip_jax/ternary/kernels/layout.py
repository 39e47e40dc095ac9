"""Trits in 32-bit words, the padded input axis, and the block sizes of the TPU kernels.

A word holds sixteen 2-bit two's-complement fields of one column. A field at the top of a lane is, without further
arithmetic, 2t as a bfloat16 (0x0000, 0x4000, 0xC000) and 64t as an int8 (0, 64, −64); the factors 1/2 and 1/64 go into
the scale. 128 consecutive k fill 8 words, the sublanes of one int32 tile, so that each of 8 (bf16) or 4 (int8) steps
gives whole (16, 128) or (32, 128) tiles in the order of k.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from tclip_jax.ternary.kernels import layout as k_axis
from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor, expand_scale

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


def pad(array: jax.Array, multiple: int, axis: int) -> jax.Array:
    """Zeros at the end of `axis`, up to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])


def padded(group: int, granule: int) -> int:
    """Positions along K from one scale to the next once groups are padded to whole granules."""
    return -(-group // granule) * granule


def spread(array: jax.Array, group: int, granule: int, multiple: int, axis: int) -> jax.Array:
    """Pads every group of `axis` to whole granules, where there is more than one; then the axis to a multiple."""
    axis %= array.ndim
    if group < array.shape[axis] and group % granule:
        array = pad(array, group, axis)
        array = array.reshape(*array.shape[:axis], -1, group, *array.shape[axis + 1 :])
        array = pad(array, granule, axis + 1)
        array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return pad(array, multiple, axis)


def gather(array: jax.Array, length: int, group: int, granule: int) -> jax.Array:
    """What `spread` made of the second-to-last axis, back to its `length`."""
    if group < length and group % granule:
        groups, own = -(-length // group), padded(group, granule)
        array = array[..., : groups * own, :].reshape(*array.shape[:-2], groups, own, array.shape[-1])
        array = array[..., :group, :].reshape(*array.shape[:-3], groups * group, array.shape[-1])
    return array[..., :length, :]


MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kind of TPU gives the kernel.

    Attributes:
      vmem: bytes that the kernel may ask for.
      rows, columns: the largest block of the output. Activations are read once for every block of columns: 1024 keep
        the product above the ridge of HBM on v4, v5e and v5p, 2048 on v6e.
      int8: whether the matrix unit multiplies int8.
    """

    vmem: int
    rows: int = 512
    columns: int = 1024
    int8: bool = True

    @property
    def usable(self) -> int:
        """The bytes for blocks; the compiler's own needs stay within the rest."""
        return self.vmem * 3 // 4


# The kinds that the kernels are compiled for; half of the VMEM stays with XLA where there is more than 16 MiB.
DEVICES = {
    "TPU v4": Device(16 * MIB, int8=False),
    "TPU v5 lite": Device(64 * MIB),
    "TPU v5": Device(32 * MIB),
    "TPU v6 lite": Device(64 * MIB, columns=2048),
}
SMALLEST = Device(16 * MIB)  # fits each of them
# So few rows cost less than the weights: narrower blocks start the pipeline sooner, scaling sums beats scaling weights.
FEW_ROWS = 256


def vmem(rows: int, k: int, columns: int, activation: int, output: int) -> int:
    """Bytes that the kernel holds for one block: activations, packed words and output twice, for the pipeline; the
    unpacked weights, of the item size of the activations, and the f32 sums once."""
    return 2 * rows * k * activation + k * columns // 2 + k * columns * activation + rows * columns * (2 * output + 4)


def block_sizes(device: Device, rows: int, k: int, columns: int, activation: int, output: int) -> tuple[int, int]:
    """Rows and columns of a block of the product of (rows, k) and (k, columns), operands of these item sizes.

    Blocks split their axis evenly, so that little of the last one is wasted, and are halved until VMEM holds them.

    Raises:
      ValueError: not even the smallest block, 32 x 128, fits.
    """
    limits = [device.rows, min(device.columns, 512) if rows <= FEW_ROWS else device.columns]
    if activation == 4:
        limits = [128, 256]  # the six passes of float32 are unrolled: larger blocks take a minute to compile
    while True:
        m, n = _split(rows, limits[0], 32), _split(columns, limits[1], 128)
        if vmem(m, k, n, activation, output) <= device.usable:
            return m, n
        if m <= 32 and n <= 128:
            raise ValueError(f"K of {k} does not fit the {device.vmem // MIB} MiB of VMEM")
        largest = 0 if n <= 128 or (m > 32 and m > n) else 1
        limits[largest] = max((m, n)[largest] // 2, (32, 128)[largest])


def _split(size: int, limit: int, tile: int) -> int:
    """The block that splits `size` into equal parts of at most `limit`, in whole tiles; all of it where it fits."""
    if size <= limit:
        return size
    parts = math.ceil(size / limit)
    return math.ceil(size / (parts * tile)) * tile
