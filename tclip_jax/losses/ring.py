"""Sums over all columns where no device holds them all: columns travel around a ring of devices."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tclip_jax.losses.blocks import Side, Sums, merge, nothing, sums_of, sums_under


class Ring(NamedTuple):
    """How rows meet columns.

    Attributes:
      axes: of the mesh in force (`jax.set_mesh`), over which a batch lies; along others it is replicated.
      chunk: the most columns that a device compares its rows with at a time: memory is O(rows per device · chunk).
    """

    axes: tuple[str, ...]
    chunk: int = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def ring_sums(rows: Side, columns: Side, ring: Ring) -> Sums:
    """`sums_of(rows, columns)` where samples lie over `ring.axes`; differentiable in `student` and `bias`.

    Every device keeps its rows, and the columns of all visit it one after the other, a chunk at a time. The backward
    pass has kept no logits, only each row's largest: it sends the columns around once more, and they bring their
    gradients home.
    """

    def on_device(rows: Side, columns: Side) -> Sums:
        def visit(_: int, state: tuple[Sums, Side]) -> tuple[Sums, Side]:
            def add(sums: Sums, chunk: Side) -> tuple[Sums, None]:
                return merge(sums, sums_of(rows, chunk)), None

            sums, columns = state
            return jax.lax.scan(add, sums, _split(columns, ring))[0], _send_on(columns, ring)

        start = _varying(nothing(rows, columns), ring), columns
        return jax.lax.fori_loop(0, jax.lax.axis_size(ring.axes), visit, start)[0]

    return _on_every_device(on_device, ring)(rows, columns)


def _forward(rows: Side, columns: Side, ring: Ring) -> tuple[Sums, Any]:
    sums = ring_sums(rows, columns, ring)
    return sums, (rows, columns, sums.top)


def _backward(ring: Ring, kept: Any, cotangent: Sums) -> tuple[Side, Side]:
    def on_device(rows: Side, columns: Side, top: Any, cotangent: Any) -> tuple[Any, Any]:
        def sums(row_floats: Any, column_floats: Any, chunk: Side) -> Any:
            return sums_under(_with_floats(rows, row_floats), _with_floats(chunk, column_floats), top)

        def visit(_: int, state: tuple[Any, Any, Side]) -> tuple[Any, Any, Side]:
            def add(to_rows: Any, each: tuple[Side, Any]) -> tuple[Any, Any]:
                chunk, to_chunk = each
                pull = jax.vjp(functools.partial(sums, chunk=chunk), _floats(rows), _floats(chunk))[1]
                more_to_rows, more_to_chunk = pull(cotangent)
                return _add(to_rows, more_to_rows), _add(to_chunk, more_to_chunk)

            to_rows, to_columns, columns = state
            to_rows, to_chunks = jax.lax.scan(add, to_rows, _split((columns, to_columns), ring))
            return to_rows, *_send_on((_join(to_chunks, len(columns.student)), columns), ring)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), (_floats(rows), _floats(columns)))
        start = *_varying(zeros, ring), columns
        return jax.lax.fori_loop(0, jax.lax.axis_size(ring.axes), visit, start)[:2]

    return _on_every_device(on_device, ring)(*kept, cotangent.sums)


ring_sums.defvjp(_forward, _backward)


def _floats(side: Side) -> Side:
    """What has a gradient."""
    return Side(side.student, side.bias)


def _with_floats(side: Side, floats: Side) -> Side:
    return side._replace(student=floats.student, bias=floats.bias)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _on_every_device(f: Any, ring: Ring) -> Any:
    each = PartitionSpec(ring.axes)
    return jax.shard_map(f, in_specs=each, out_specs=each)


def _varying(tree: Any, ring: Ring) -> Any:
    return jax.lax.pcast(tree, ring.axes, to="varying")


def _send_on(tree: Any, ring: Ring) -> Any:
    devices = jax.lax.axis_size(ring.axes)
    return jax.lax.ppermute(tree, ring.axes, [(i, (i + 1) % devices) for i in range(devices)])


def _split(tree: Any, ring: Ring) -> Any:
    """Samples (B, …) as the fewest equal chunks (N, C, …) of at most `ring.chunk`.

    The last is filled up with zeros, which as `Side.real` are samples that do not exist: they change no sum.
    """
    samples = len(jax.tree.leaves(tree)[0])
    chunks = -(-samples // ring.chunk)
    size = -(-samples // chunks)

    def split(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, chunks * size - samples), *[(0, 0)] * (x.ndim - 1)])
        return filled.reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, tree)


def _join(chunks: Any, samples: int) -> Any:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:samples], chunks)
