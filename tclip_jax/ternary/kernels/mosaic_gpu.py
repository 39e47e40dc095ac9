"""Ternary product on Hopper GPUs with Pallas Mosaic GPU: 2 bits per weight in memory, bf16 in shared memory, wgmma.

It has been lowered for CUDA and run by Pallas' GPU interpreter on a CPU, but never on a GPU. Its speed is unknown, so
the dispatcher selects it only if the caller forces it.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tclip_jax.ternary.kernels import layout
from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.tensor import Activations, PackedTensor, TernaryTensor, expand_scale

NAME = "mosaic_gpu"

COLUMNS = 64  # columns of a block: the rows of one wgmma, whose result is transposed
BLOCK = 256  # k of a block: 16 words of 16 fields
STEP = 16  # k in one field of the words of a block; groups are padded to whole steps
_SWIZZLE = 32  # bytes of a step in bf16, so that each step is whole tiles of shared memory


def _load(ref: Any, layout: Any) -> jax.Array:
    """Load all of `ref`; before jax 0.12 `plgpu.load` also takes an index."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def unsupported(*, device_kind: str, platform: str, dtype: Any, activations: Activations, **_: Any) -> str | None:
    if platform != "gpu":
        return f"a GPU kernel does not run on platform {platform}"
    if not re.search(r"\bG?H(20|100|200|800)\b", device_kind):
        return f"it needs a Hopper GPU (H100, H200) for wgmma, not {device_kind}"
    if activations == "A32" and dtype != jnp.bfloat16:
        return f"activations are bfloat16, not {dtype}"
    return None


def slower(**_: Any) -> str | None:
    return "it has not run on a GPU yet, only been lowered and interpreted"


@jax.jit
def pack(w: TernaryTensor) -> PackedTensor:
    """Pack a weight into int32 words (…, N′, K′ / 16) and float32 scales (…, G, N′).

    K′ is a multiple of 256, N′ of 64. k = 256 b + 16 i + c is the two's-complement field i, counted from the lowest, of
    word 16 b + c.
    """
    trits = layout.pad(layout.spread(w.trits, w.group, STEP, BLOCK, -2), COLUMNS, -1)
    *layers, length, columns = trits.shape
    fields = (trits.astype(jnp.uint32) & 3).reshape(*layers, -1, 16, STEP, columns) << _shifts()
    words = jax.lax.bitcast_convert_type(fields.sum(-3, dtype=jnp.uint32), jnp.int32)
    words = jnp.swapaxes(words.reshape(*layers, length // 16, columns), -1, -2)
    scale = jnp.broadcast_to(w.scale, (*w.scale.shape[:-1], w.shape[-1])).astype(jnp.float32)
    return PackedTensor(words, layout.pad(scale, COLUMNS, -1), (w.shape[-2], w.shape[-1]), w.group, NAME)


@jax.jit
def unpack(w: PackedTensor) -> jax.Array:
    """The float32 weights (…, K, N)."""
    words = jax.lax.bitcast_convert_type(jnp.swapaxes(w.data, -1, -2), jnp.uint32)
    blocks = words.reshape(*words.shape[:-2], -1, 1, STEP, words.shape[-1])
    # Each field moves to the top of an int8; the arithmetic shift back extends its sign.
    fields = ((blocks >> _shifts()).astype(jnp.uint8) << 6).astype(jnp.int8) >> 6
    trits = fields.reshape(*words.shape[:-2], -1, words.shape[-1])
    trits = layout.gather(trits, w.layer_shape[0], w.group, STEP)
    return (trits * expand_scale(w.scale, w.group, w.layer_shape[0], -2))[..., : w.layer_shape[1]]


def _shifts() -> jax.Array:
    return 2 * jnp.arange(16, dtype=jnp.uint32)[:, None, None]


def matmul(x: jax.Array, w: PackedTensor, *, activations: Activations, interpret: Any = None) -> jax.Array:
    """Multiply in bf16 with float32 sums: x · ŵ.

    Weights are rounded to bf16, and with them group scales of more than 8 significant bits. So are activations with
    A16. With A8 the rounded activations are bf16 too, which holds ±127 exactly.
    """
    rows, level = quantize_activations(x) if activations == "A8" else (x, None)
    size = next((size for size in (16, 32) if len(x) <= size), 64)
    rows = layout.pad(layout.spread(rows.astype(jnp.bfloat16), w.group, STEP, BLOCK, -1), size, 0)
    product = _dot(rows.T, w.data, w.scale, group=layout.padded(w.group, STEP), rows=size, interpret=interpret)
    product = product.T[: len(x), : w.layer_shape[1]]
    return (product if level is None else product * level).astype(x.dtype)


def _dot(x: jax.Array, words: jax.Array, scale: jax.Array, *, group: int, rows: int, interpret: Any) -> jax.Array:
    """ŵᵀ · x for activations (K, M): float32 (N, M), in blocks of 64 columns and `rows` rows."""
    (k, m), n = x.shape, words.shape[0]
    tiles = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(_SWIZZLE))
    word_tiles = (plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(64))

    def kernel(x_gmem: Any, words_gmem: Any, scale_gmem: Any, out_gmem: Any, weight_smem: Any, out_smem: Any) -> None:
        own_columns = pl.ds(jax.lax.axis_index("columns") * COLUMNS, COLUMNS)
        own_rows = pl.ds(jax.lax.axis_index("rows") * rows, rows)

        def multiply(total: Any) -> jax.Array:
            def block(index: Any, words_smem: Any, x_smem: Any) -> None:
                words, level = words_smem[...], None
                for i in range(16):
                    if level is None or group % BLOCK:
                        # The padding of K lies beyond the last group.
                        j = jnp.minimum((index[0] * BLOCK + i * STEP) // group, scale_gmem.shape[0] - 1)
                        registers = plgpu.Layout.WGMMA.reduce(1)
                        level = _load(scale_gmem.at[j, own_columns], registers)
                        level = jax.lax.broadcast_in_dim(level, (COLUMNS, STEP), (0,))
                    # The shift to the top and back extends the sign of the field.
                    weights = ((words << (30 - 2 * i)) >> 30).astype(jnp.float32) * level
                    weight_smem[:, pl.ds(i * STEP, STEP)] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.wgmma(total, weight_smem, x_smem)
                plgpu.wgmma_wait(0)  # the next block overwrites the weights

            plgpu.emit_pipeline(
                block,
                grid=(k // BLOCK,),
                in_specs=[
                    plgpu.BlockSpec((COLUMNS, 16), lambda b: (0, b), transforms=word_tiles),
                    plgpu.BlockSpec((BLOCK, rows), lambda b: (b, 0), transforms=tiles),
                ],
                max_concurrent_steps=3,
            )(words_gmem.at[own_columns, :], x_gmem.at[:, own_rows])
            return total[...]

        out_smem[...] = pl.run_scoped(multiply, plgpu.ACC((COLUMNS, rows), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[own_columns, own_rows])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((n, m), jnp.float32),
        grid=(n // COLUMNS, m // rows),
        grid_names=("columns", "rows"),
        scratch_types=[
            plgpu.SMEM((COLUMNS, BLOCK), jnp.bfloat16, transforms=tiles),
            plgpu.SMEM((COLUMNS, rows), jnp.float32),
        ],
        **({} if interpret is None else {"interpret": interpret}),
    )(x, words, scale)
