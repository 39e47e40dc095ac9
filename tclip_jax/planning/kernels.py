"""What a Pallas kernel costs: bytes by its blocks and grid, and FLOPs by its products. No estimate of its own is read.

A block is moved whenever its index differs from that of the grid step before, so a block that is read again counts
again. Blocks count with the padding of tiles, products with that of the matrix unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from tclip_jax.ternary.kernels.layout import LANES, SUBLANES

_PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}  # products in bfloat16 for one of float32


class KernelCost(NamedTuple):
    """What one call of a kernel moves and computes on a device.

    Attributes:
      operands: bytes read of each operand.
      results: bytes written of each result.
      flops: operations of its matrix products.
    """

    operands: tuple[int, ...]
    results: tuple[int, ...]
    flops: int


# Name of the kernel and shapes of its results -> its cost. In a compiled program these are all that is left of a call.
Costs = dict[tuple[str, tuple[tuple[int, ...], ...]], KernelCost]


def kernel_costs(jaxpr: core.Jaxpr) -> Costs:
    """Return the costs of all Pallas kernels that a function calls, by name and shapes of the results.

    Args:
      jaxpr: of the function, before it is compiled. A kernel over several devices must be within `shard_map`.

    Raises:
      ValueError: two kernels of one name have results of the same shapes and different costs, or a loop of a kernel has
        no fixed number of steps.
    """
    costs: Costs = {}
    for equation in _equations(jaxpr):
        if equation.primitive.name != "pallas_call":
            continue
        key = equation.params["name"], tuple(tuple(each.aval.shape) for each in equation.outvars)
        cost = _cost(equation)
        if costs.setdefault(key, cost) != cost:
            raise ValueError(f"kernel {key[0]} with results {key[1]} has two costs, {costs[key]} and {cost}")
    return costs


def _equations(jaxpr: core.Jaxpr) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of those within it, but not those of kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in _within(equation):
                yield from _equations(inner)


def _within(equation: Any) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _cost(equation: Any) -> KernelCost:
    mapping, kernel = equation.params["grid_mapping"], equation.params["jaxpr"]
    steps = np.array(list(itertools.product(*map(range, mapping.grid))), np.int32).reshape(math.prod(mapping.grid), -1)
    moved = tuple(_moved(block, steps) for block in mapping.block_mappings)
    inputs = mapping.num_inputs
    return KernelCost(moved[:inputs], moved[inputs:], len(steps) * _flops(kernel))


def _moved(block: Any, steps: np.ndarray) -> int:
    """Return the bytes that the pipeline moves of one array in all steps of the grid, in order."""
    fetches = 1
    if len(steps) > 1:
        index_map = jax.vmap(core.jaxpr_as_fun(block.index_map_jaxpr))
        with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
            indices = np.stack([np.broadcast_to(each, len(steps)) for each in index_map(*steps.T)], axis=-1)
        fetches += int((indices[1:] != indices[:-1]).any(axis=1).sum())
    shape = [getattr(size, "block_size", size) or 1 for size in block.block_shape]
    dtype = block.array_aval.dtype
    return fetches * math.prod(_tiled(shape)) * dtype.itemsize


def _tiled(shape: list[int]) -> list[int]:
    """Pad the last two axes to whole tiles of HBM, T(8,128) in the text of compiled programs."""
    tile = [1] * (len(shape) - 2) + [SUBLANES, LANES][-len(shape) :]
    return [-(-size // unit) * unit for size, unit in zip(shape, tile, strict=True)]


def _flops(jaxpr: core.Jaxpr) -> int:
    """Return the operations of the products of a kernel in one step of its grid, padded for the matrix unit."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            inner = sum(map(_flops, _within(equation)))
            if inner and name == "while":
                raise ValueError("a loop of the kernel has no fixed number of steps")
            total += inner * (equation.params["length"] if name == "scan" else 1)
    return total


def _product(equation: Any) -> int:
    (a_inner, _), (a_batch, _) = equation.params["dimension_numbers"]
    a, b = (each.aval.shape for each in equation.invars)
    batch, inner = math.prod(a[i] for i in a_batch), math.prod(a[i] for i in a_inner)
    rows = math.prod(a) // batch // inner
    columns = math.prod(b) // batch // inner
    # float32 operands take several passes of bfloat16 products.
    narrow = any(each.aval.dtype != np.float32 for each in equation.invars)
    precision = equation.params["precision"]
    passes = 1 if narrow or not precision else _PASSES.get(precision[0], 1)
    units = zip((rows, inner, columns), (SUBLANES, LANES, LANES), strict=True)
    return 2 * passes * batch * math.prod(-(-size // unit) * unit for size, unit in units)
