"""Counts of VLIW bundles of a TPU kernel in libtpu's dumps, for `benchmarks.tpu_static`; static counts, not times."""

from __future__ import annotations

import functools
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tclip_jax.ternary.kernels.layout import BLOCK, Device, Order, block_sizes
from tclip_jax.ternary.kernels.tpu_dot import tpu_dot

ROWS = 1576  # eight images of 197 tokens
_BUNDLE = re.compile(r"\s*0(?:x[0-9a-f]+)?\s+(?:[A-Z]{2})?\s*:\s*(>*)")


def dump_flags(folder: str) -> str:
    """Return LIBTPU_INIT_ARGS that dump kernels to a folder. The flags are undocumented; a libtpu may lack them."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def dense_dot(x: jax.Array, w: jax.Array, scale: jax.Array, *, blocks: tuple[int, int], vmem: int) -> jax.Array:
    """Multiply by dense weights with the same grid and dot as the packed kernel, and one scale per column."""
    (m, k), n, (rows, columns) = x.shape, w.shape[1], blocks
    total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def kernel(x_ref: Any, w_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        product = jax.lax.dot(x_ref[...], w_ref[...], preferred_element_type=total)
        out_ref[...] = (product.astype(jnp.float32) * scale_ref[...]).astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, columns), pl.cdiv(m, rows)),
        in_specs=[
            pl.BlockSpec((rows, k), lambda j, i: (i, 0)),
            pl.BlockSpec((k, columns), lambda j, i: (0, j)),
            pl.BlockSpec((1, columns), lambda j, i: (0, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda j, i: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
    )(x, w, scale)


def bundles(function: Callable[..., Any], arguments: list[Any], folder: pathlib.Path) -> tuple[int, int] | None:
    """Return the bundles outside and inside the inner loop of the one kernel in `function`; None without a dump."""
    shutil.rmtree(folder, ignore_errors=True)
    jax.jit(function).lower(*arguments).compile()
    dumped = [path for path in folder.glob("*-final_bundles.txt") if "late-finalization" not in path.name]
    if not dumped:
        return None
    text = max(dumped, key=lambda path: path.stat().st_size).read_text()
    depths = [len(match[1]) for match in map(_BUNDLE.match, text.splitlines()) if match]
    shutil.rmtree(folder)
    return sum(depth < 2 for depth in depths), sum(depth >= 2 for depth in depths)


def compare(
    device: Device, order: Order, k: int, n: int, groups: int, shard: Callable[..., Any], folder: pathlib.Path
) -> dict[str, Any] | None:
    """Compare the bundles of the packed and the dense kernel, for one block of columns and 1576 rows.

    Args:
      device: the device, which determines the block sizes.
      order: "bf16" or "int8", the dtype of activations and unpacked weights.
      k, n: shape of the weight.
      groups: number of scales along K.
      shard: function of (shape, dtype) that returns an abstract array on the device.
      folder: the folder that libtpu dumps to.
    """
    dtype = jnp.dtype(jnp.int8 if order == "int8" else jnp.bfloat16)
    blocks = block_sizes(device, ROWS, k, n, dtype.itemsize, 2)
    x = shard((ROWS, k), dtype)
    packed = functools.partial(tpu_dot, order=order, group=k // groups, out_dtype=jnp.bfloat16, device=device)
    words, scale = shard((k // 16, n), jnp.int32), shard((groups, n), jnp.float32)
    twin = functools.partial(dense_dot, blocks=blocks, vmem=device.vmem)
    steps = -(-ROWS // blocks[0])
    counts = bundles(packed, [x, words, scale], folder)
    dense = bundles(twin, [x, shard((k, n), dtype), shard((1, n), jnp.float32)], folder)
    if counts is None or dense is None:
        return None
    executed = [steps * outer + k // BLOCK * inner for outer, inner in (counts, dense)]
    static = [sum(counts), sum(dense)]
    return {
        "order": order,
        "k": k,
        "n": n,
        "groups": groups,
        "blocks": blocks,
        "packed": executed[0],
        "dense": executed[1],
        "ratio": executed[0] / executed[1],
        "static_ratio": static[0] / static[1],
    }
