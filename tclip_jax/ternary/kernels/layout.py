"""Trits in 32-bit words, the padded input axis, and the block sizes of the TPU kernels.

A word holds sixteen 2-bit two's-complement fields of one column. A field at the top of a lane is 2t as a bfloat16
(0x0000, 0x4000, 0xC000) and 64t as an int8 (0, 64, −64) without further arithmetic; the scale absorbs the factors 1/2
and 1/64. 128 consecutive k fill 8 words, the sublanes of one int32 tile. Each of 8 (bf16) or 4 (int8) steps therefore
gives whole (16, 128) or (32, 128) tiles in the order of k.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from tclip_jax.ternary.tensor import PackedTensor, TernaryTensor, expand_scale

Order = Literal["bf16", "int8"]

SUBLANES, LANES = 8, 128  # rows and columns of a tile of 32-bit numbers
BLOCK = 128  # k of 8 words with 16 fields each
_PER_WORD = {"bf16": 2, "int8": 4}  # lanes in a word
_FACTOR = {"bf16": 2, "int8": 64}  # value of an unpacked trit of 1
# Groups are padded to a multiple of it: to whole steps (bf16), or to whole blocks (int8, whose sums are scaled).
GRANULE = {"bf16": 16, "int8": BLOCK}


def pack_words(trits: jax.Array, order: Order) -> jax.Array:
    """Pack int8 trits (..., K, N), K a multiple of 128, into int32 words (..., K / 16, N).

    With L lanes in a word (2 for bf16, 4 for int8) and S = 16 / L steps, k = 128 g + 8 L i + L r + h of step i is the
    field S h + S − 1 − i of word 8 g + r.
    """
    *layers, length, columns = trits.shape
    fields = (trits.astype(jnp.uint32) & 3).reshape(*layers, -1, 16 // _PER_WORD[order], 8, _PER_WORD[order], columns)
    # Fields do not overlap, so the sum is a bitwise or.
    words = (fields << _shifts(order)).sum(axis=(-4, -2), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(*layers, length // 16, columns)


def unpack_words(words: jax.Array, order: Order) -> jax.Array:
    """Undo `pack_words`: int8 trits (..., K, N)."""
    *layers, rows, columns = words.shape
    blocks = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(*layers, -1, 1, 8, 1, columns)
    # Each field moves to the top of an int8; the arithmetic shift back extends its sign.
    fields = ((blocks >> _shifts(order)).astype(jnp.uint8) << 6).astype(jnp.int8) >> 6
    return fields.reshape(*layers, 16 * rows, columns)


def unpack_step(words: jax.Array, i: int, order: Order) -> jax.Array:
    """Step i of a block inside the kernel: int32 whose lanes, after a bitcast, are 2t as bfloat16 or 64t as int8."""
    mask = {"bf16": 0xC000C000, "int8": 0xC0C0C0C0}[order]
    return jax.lax.shift_left(words, jnp.int32(2 * i)) & jnp.int32(mask - (1 << 32))


def _shifts(order: Order) -> jax.Array:
    """Number of bits below each field: uint32 (steps, 1, lanes, 1)."""
    steps = 16 // _PER_WORD[order]
    i, h = jnp.arange(steps, dtype=jnp.uint32)[:, None, None, None], jnp.arange(_PER_WORD[order], dtype=jnp.uint32)
    return 2 * (steps * h[:, None] + steps - 1 - i)


@functools.partial(jax.jit, static_argnames=("order", "layout"))
def pack(w: TernaryTensor, order: Order, layout: str) -> PackedTensor:
    """Pack a weight into words (…, K′ / 16, N′) and float32 scales (…, G, N′), divided by the order's factor.

    N′ is a multiple of 128.
    """
    trits = pad(spread(w.trits, w.group, GRANULE[order], BLOCK, -2), 128, -1)
    scale = jnp.broadcast_to(w.scale, (*w.scale.shape[:-1], w.shape[-1])).astype(jnp.float32) / _FACTOR[order]
    shape = (w.shape[-2], w.shape[-1])
    return PackedTensor(pack_words(trits, order), pad(scale, 128, -1), shape, w.group, layout)


@functools.partial(jax.jit, static_argnames="order")
def unpack(w: PackedTensor, order: Order) -> jax.Array:
    """The float32 weights (…, K, N)."""
    trits = gather(unpack_words(w.data, order), w.layer_shape[0], w.group, GRANULE[order])
    return (trits * expand_scale(w.scale * _FACTOR[order], w.group, w.layer_shape[0], -2))[..., : w.layer_shape[1]]


def pad(array: jax.Array, multiple: int, axis: int) -> jax.Array:
    """Pad the end of `axis` with zeros to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis % array.ndim else 0) for i in range(array.ndim)])


def padded(group: int, granule: int) -> int:
    """Distance along K from one scale to the next, after groups are padded to whole granules."""
    return -(-group // granule) * granule


def spread(array: jax.Array, group: int, granule: int, multiple: int, axis: int) -> jax.Array:
    """Pad each group of `axis` to whole granules, if there are several groups; then pad the axis to a multiple."""
    axis %= array.ndim
    if group < array.shape[axis] and group % granule:
        array = pad(array, group, axis)
        array = array.reshape(*array.shape[:axis], -1, group, *array.shape[axis + 1 :])
        array = pad(array, granule, axis + 1)
        array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return pad(array, multiple, axis)


def gather(array: jax.Array, length: int, group: int, granule: int) -> jax.Array:
    """Undo `spread` on the second-to-last axis, whose unpadded size is `length`."""
    if group < length and group % granule:
        groups, own = -(-length // group), padded(group, granule)
        array = array[..., : groups * own, :].reshape(*array.shape[:-2], groups, own, array.shape[-1])
        array = array[..., :group, :].reshape(*array.shape[:-3], groups * group, array.shape[-1])
    return array[..., :length, :]


MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of a kind of TPU.

    Attributes:
      vmem: bytes of VMEM that the kernel may use.
      rows: rows of the largest block of the output.
      columns: columns of the largest block of the output. Activations are read once for each block of columns: with
        1024 columns the product stays above the ridge of HBM on v4, v5e and v5p, with 2048 on v6e.
      int8: whether the matrix unit multiplies int8.
    """

    vmem: int
    rows: int = 512
    columns: int = 1024
    int8: bool = True

    @property
    def usable(self) -> int:
        """Bytes for blocks; the rest is for the compiler."""
        return self.vmem * 3 // 4


# The TPUs that the kernels are compiled for. If VMEM is larger than 16 MiB, half of it is left to XLA.
DEVICES = {
    "TPU v4": Device(16 * MIB, int8=False),
    "TPU v5 lite": Device(64 * MIB),
    "TPU v5": Device(32 * MIB),
    "TPU v6 lite": Device(64 * MIB, columns=2048),
}
SMALLEST = Device(16 * MIB)  # fits all of them
# Up to so many rows, the weights dominate: narrow blocks start the pipeline sooner, and it is faster to scale sums.
FEW_ROWS = 256


def vmem(rows: int, k: int, columns: int, activation: int, output: int) -> int:
    """Bytes of VMEM for one block.

    Activations, packed words and output count twice, for the pipeline. The unpacked weights, of the item size of the
    activations, and the float32 sums count once.
    """
    return 2 * rows * k * activation + k * columns // 2 + k * columns * activation + rows * columns * (2 * output + 4)


def block_sizes(device: Device, rows: int, k: int, columns: int, activation: int, output: int) -> tuple[int, int]:
    """Rows and columns of a block of the product of (rows, k) and (k, columns), with operands of the given item sizes.

    Blocks split their axis evenly, to waste little of the last one, and are halved until they fit VMEM.

    Raises:
      ValueError: the smallest block, 32 x 128, does not fit.
    """
    limits = [device.rows, min(device.columns, 512) if rows <= FEW_ROWS else device.columns]
    if activation == 4:
        limits = [128, 256]  # float32 takes six unrolled passes: larger blocks take a minute to compile
    while True:
        m, n = _split(rows, limits[0], 32), _split(columns, limits[1], 128)
        if vmem(m, k, n, activation, output) <= device.usable:
            return m, n
        if m <= 32 and n <= 128:
            raise ValueError(f"K of {k} does not fit the {device.vmem // MIB} MiB of VMEM")
        largest = 0 if n <= 128 or (m > 32 and m > n) else 1
        limits[largest] = max((m, n)[largest] // 2, (32, 128)[largest])


def _split(size: int, limit: int, tile: int) -> int:
    """The block that splits `size` into equal parts of at most `limit`, in whole tiles; `size` itself if it fits."""
    if size <= limit:
        return size
    parts = math.ceil(size / limit)
    return math.ceil(size / (parts * tile)) * tile
