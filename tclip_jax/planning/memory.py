"""Bytes on a device, by what they hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from tclip_jax.training.build import Build


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device in a step.

    Attributes:
      parameters, optimizer, average, teacher, batch: of arrays that go into the step, by shapes and shardings. The
        state (the first three) comes out in the same memory.
      padding: that the compiler adds to them, whose tiles are larger than some arrays.
      temporaries: at the moment of the step that needs most: activations, gradients, gathered weights.
      outputs: metrics.
      program: the compiled instructions.
    """

    parameters: int
    optimizer: int
    average: int
    teacher: int
    batch: int
    padding: int
    temporaries: int
    outputs: int
    program: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def argument_bytes(build: Build) -> dict[str, int]:
    """Of what goes into the step of a run, by the first fields of `Memory`."""
    state = build.state_shapes
    return {
        "parameters": device_bytes((state.params, state.step)),
        "optimizer": device_bytes(state.optimizer),
        "average": device_bytes(state.average),
        "teacher": device_bytes(build.teacher_shapes),
        "batch": device_bytes(build.batch_shapes),
    }


def device_bytes(tree: Any) -> int:
    """Bytes of one device's shards of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_memory(compiled: Any, arguments: dict[str, int]) -> Memory:
    """The compiler's own account of an executable (jax.stages.Compiled) that takes `arguments`."""
    stats = compiled.memory_analysis()
    return Memory(
        **arguments,
        padding=stats.argument_size_in_bytes - sum(arguments.values()),
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        program=stats.generated_code_size_in_bytes,
    )
