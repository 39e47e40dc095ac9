"""Compile the training step of a run for TPUs, on a machine without TPUs.

As a program, `python -m tclip_jax.planning.compile` answers one request on stdin. `planning.child` starts one process
for each compilation, because libtpu may abort its process and logs to its terminal.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from tclip_jax.inference.load import Architecture
from tclip_jax.models.attention import explain_choice
from tclip_jax.models.config import CLIPConfig
from tclip_jax.parallel.mesh import BATCH_AXES, make_mesh
from tclip_jax.planning.collectives import (
    Collective,
    carries_activations,
    find_collectives,
    kernel_flops,
    memory_traffic,
)
from tclip_jax.planning.estimate import StepFacts, argument_bytes, compiled_memory
from tclip_jax.planning.hardware import Topology, parse_topology
from tclip_jax.planning.hlo import parse_program
from tclip_jax.planning.kernels import kernel_costs
from tclip_jax.planning.liveness import dump_options, find_peak, read_assignment
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import run_config
from tclip_jax.training.build import Build, check_batch


def compile_for(config: Mapping[str, Any], topology: Topology, teacher_preset: str = "") -> StepFacts:
    """Compile the step of a configuration for a slice of TPUs with libtpu.

    Args:
      config: fields of the configuration.
      topology: the slice.
      teacher_preset: see `find_teacher`.

    Raises:
      ValueError: the configuration is invalid, or does not fit the topology.
    """
    run = run_config(ml_collections.ConfigDict(dict(config)))
    # By default libtpu describes a v4 chip as two devices, but runtimes present it as one (megacore).
    options: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    if run.mesh.slices > 1:
        options["num_slices"] = run.mesh.slices
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=described.devices)
    check_batch(run, mesh)
    return compile_step(Build(run, mesh, find_teacher(run, teacher_preset)), topology)


def compile_step(build: Build, topology: Topology | None = None) -> StepFacts:
    """Compile a step for a mesh and return its facts; without a topology, `links` is empty."""
    started = time.perf_counter()
    with jax.set_mesh(build.mesh):
        shapes = build.state_shapes, build.batch_shapes, build.teacher_shapes
        traced = build.jitted_step(shapes[0]).trace(*shapes)
        with tempfile.TemporaryDirectory() as dumps:
            compiled = traced.lower().compile(dump_options(dumps))
            assignment = read_assignment(dumps)
        attention = attention_choices(build)
    seconds = time.perf_counter() - started
    text = compiled.as_text()
    program, kernels = parse_program(text), kernel_costs(traced.jaxpr.jaxpr)
    mesh = dict(build.mesh.shape)
    collectives = find_collectives(program, mesh)
    memory = compiled_memory(compiled, argument_bytes(build))
    rows = build.run.data.batch_size
    sizes = activation_sizes(build)
    least_rows = rows // math.prod(mesh[axis] for axis in BATCH_AXES) // build.run.data.microbatches
    # The loss exchanges the embeddings of the whole batch, which may be as large as the activations of a part of it.
    known = weight_shapes(build) | {tuple(sorted((rows, config.embed_dim))) for config in _configs(build)}
    moving = (each for each in collectives if carries_activations(each, sizes, rows, least_rows, known))
    return StepFacts(
        how="compiled",
        mesh=mesh,
        memory=memory,
        peak=compiled.memory_analysis().peak_memory_in_bytes,
        traffic=memory_traffic(program, kernels),
        collectives=tuple(collectives),
        moving_activations=tuple(f"{each.kind} {_shapes(each)} {each.name}" for each in moving),
        links=count_links(build.mesh, topology, (each.axes for each in collectives)) if topology else {},
        seconds=seconds,
        kernel_flops=kernel_flops(program, kernels),
        attention=attention,
        at_peak=find_peak(assignment, program, text),
    )


def attention_choices(build: Build) -> dict[str, tuple[str, str]]:
    """Return the implementation of the attention of each tower of a step, and the reason of the choice.

    The keys are "student image", "student text", "teacher image" and "teacher text". Call it under `jax.set_mesh`.
    """
    run, rows = build.run, build.run.data.batch_size // build.run.data.microbatches
    models = {"student": run.model}
    if isinstance(build.teacher, Architecture):
        models["teacher"] = build.teacher.config
    return {
        f"{name} {tower}": explain_choice(
            (rows, tokens, shape.heads, shape.width // shape.heads), run.dtype, run.attention
        )
        for name, config in models.items()
        for tower, (shape, tokens) in config.towers.items()
    }


def activation_sizes(build: Build) -> frozenset[int]:
    """Return sequence · width of the activations of student and teacher, whole and sharded over `tensor`.

    These are hidden states, queries, keys, values, activations of MLPs, and attention logits.
    """
    return frozenset(
        size // part
        for config in _configs(build)
        for size in _sizes(config)
        for part in (1, build.mesh.shape.get("tensor", 1))
    )


def weight_shapes(build: Build) -> frozenset[tuple[int, ...]]:
    """Return shapes of parameters, sorted and without axes of size 1: whole or sharded, stacked or of one layer."""
    shapes: set[tuple[int, ...]] = set()
    for leaf in jax.tree.leaves((build.state_shapes.params, build.teacher_shapes)):
        for shape in (leaf.shape, leaf.shape[1:]):
            choices = [[size // part for part in (1, *build.mesh.shape.values(), build.mesh.size)] for size in shape]
            shapes |= {tuple(sorted(size for size in sizes if size > 1)) for sizes in itertools.product(*choices)}
    return frozenset(shapes)


def _configs(build: Build) -> list[CLIPConfig]:
    return [build.run.model, *([build.teacher.config] if isinstance(build.teacher, Architecture) else [])]


def _sizes(config: CLIPConfig) -> Iterable[int]:
    for tower, tokens in (
        (config.vision, 1 + math.prod(config.vision.grid)),
        (config.text, config.text.context_length),
    ):
        widths = (tower.width, 3 * tower.width, int(tower.width * tower.mlp_ratio), tower.heads * tokens)
        lengths = (tokens, tokens - 1) if tower is config.vision else (tokens,)
        yield from (length * width for length in lengths for width in widths)


def count_links(mesh: Mesh, topology: Topology, axes: Iterable[Sequence[str]]) -> dict[str, int]:
    """Count the links of a device that ring collectives over mesh axes use at once.

    Axes use two links in each dimension of the torus that they fill and that closes to a ring, and one link in each
    other dimension along which they lie.

    Args:
      mesh: mesh of TPU devices, which have coordinates.
      topology: the torus.
      axes: tuples of mesh axes.

    Returns:
      The names of the axes, joined by "+" -> links.
    """
    coordinates = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    links = {}
    for names in set(map(tuple, axes)):
        index = tuple(slice(None) if name in names else 0 for name in mesh.axis_names)
        group = coordinates[index].reshape(-1, coordinates.shape[-1])
        extents = [len(set(group[:, i])) for i in range(len(topology.shape))]
        links["+".join(names)] = sum(
            2 if extent == size and size % topology.chip.ring == 0 else 1
            for extent, size in zip(extents, topology.shape, strict=True)
            if extent > 1
        )
    return links


def _shapes(collective: Collective) -> str:
    dims = [f"{each.dtype}[{','.join(map(str, each.dims))}]" for each in itertools.islice(collective.arrays, 3)]
    return ", ".join(dims) + ("…" if len(collective.arrays) > 3 else "")


def main() -> int:
    """Read a request from stdin, and print its facts or its error as the last line, after "answer "."""
    request = json.load(sys.stdin)
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program comes without its buffer assignment
    try:
        topology = parse_topology(request["topology"])
        answer: dict[str, Any] = {
            "facts": compile_for(request["config"], topology, request["teacher_preset"]).to_json()
        }
    except (ValueError, OSError) as error:
        answer = {"error": str(error)}
    print("answer " + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
