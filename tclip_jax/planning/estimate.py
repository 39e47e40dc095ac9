"""What is known of a step before it runs: memory, work and traffic, from compiling it or by formula.

Of GPUs nothing is compiled, so their numbers are rougher than those of TPUs. Sharding is exact: it asks the same rules
as training. Activations are those of a transformer with fused attention (no logits in memory, as cuDNN and Pallas do
it) and, with remat, one hidden state kept a layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, find_quantizer
from tclip_jax.parallel.mesh import BATCH_AXES, abstract_mesh
from tclip_jax.parallel.sharding import path_of
from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.build import Architecture, Build, check_batch


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


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """Of one step on one device.

    Attributes:
      how: "compiled" or "by formula".
      mesh: sizes of its axes.
      memory: bytes by what they hold.
      peak: bytes that the compiler says are alive at most at once, those on the chip among them, and gaps between them
        not; 0 by formula. `memory.total` is what is set aside.
      traffic: bytes to and from HBM.
      collectives: the largest first.
      moving_activations: names of collectives that carry a batch x sequence x width array.
      links: for the axes of a collective joined by "+": links of a device that its rings use at once.
      seconds: that compiling took.
    """

    how: str
    mesh: dict[str, int]
    memory: Memory
    peak: int
    traffic: int
    collectives: tuple[Collective, ...]
    moving_activations: tuple[str, ...]
    links: dict[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"collectives": [each.to_json() for each in self.collectives]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> StepFacts:
        return cls(
            **{
                **fields,
                "memory": Memory(**fields["memory"]),
                "collectives": tuple(map(Collective.from_json, fields["collectives"])),
                "moving_activations": tuple(fields["moving_activations"]),
            }
        )


_XLA = {"bfloat16": "bf16", "float32": "f32"}


def formula_facts(run: RunConfig, topology: Topology, teacher_preset: str = "") -> StepFacts:
    """The facts of a run's step on so many GPUs.

    Raises:
      ValueError: a mesh or a batch that does not fit them, or a teacher whose shape is not known.
    """
    # Only shapes are asked of it, which a mesh without devices has too.
    mesh: Any = abstract_mesh(topology.devices, run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    check_batch(run, mesh)
    build = Build(run, mesh, find_teacher(run, teacher_preset))
    arguments = argument_bytes(build)
    temporaries = _temporaries(build)
    collectives = tuple(sorted(_collectives(build), key=lambda each: -each.sent_bytes))
    return StepFacts(
        how="by formula",
        mesh=dict(mesh.shape),
        memory=Memory(**arguments, padding=0, temporaries=temporaries, outputs=0, program=0),
        peak=0,
        # The state is read and written; each activation is written, and read twice.
        traffic=2 * (arguments["parameters"] + arguments["optimizer"] + arguments["average"]) + _activations(build),
        collectives=collectives,
        moving_activations=(),
        links={},
        seconds=0.0,
    )


def _rows(build: Build) -> int:
    return build.run.data.batch_size // math.prod(build.mesh.shape[axis] for axis in BATCH_AXES)


def _towers(config: CLIPConfig) -> Iterator[tuple[VisionConfig | TextConfig, int]]:
    yield config.vision, 1 + math.prod(config.vision.grid)
    yield config.text, config.text.context_length


def _block(tower: VisionConfig | TextConfig) -> float:
    """Widths that a block holds for its backward pass: two norms, q, k, v, their mix, and the MLP twice."""
    return 6 + 2 * tower.mlp_ratio


def _temporaries(build: Build) -> int:
    """Gradients, what the backward pass keeps, one block at work, one block's gathered weights, and the loss."""
    run, rows = build.run, _rows(build)
    itemsize = 2 if run.dtype == "bfloat16" else 4
    kept = working = 0.0
    for tower, tokens in _towers(run.model):
        state = rows * tokens * tower.width * itemsize
        kept += tower.layers * state * (1 if run.remat else _block(tower))
        working = max(working, _block(tower) * state)
    if isinstance(build.teacher, Architecture):
        widest = (rows * tokens * tower.width * _block(tower) for tower, tokens in _towers(build.teacher.config))
        working = max(working, itemsize * max(widest))
    gradients = device_bytes(build.state_shapes.params)
    # Similarities with every text and image of the global batch, and their gradient, float32.
    similarities = 4 * 4 * rows * run.data.batch_size
    return int(kept + working + gradients + similarities)


def _activations(build: Build) -> int:
    """Bytes that the forward and backward passes move: each block's arrays once written and twice read."""
    run, rows = build.run, _rows(build)
    itemsize = 2 if run.dtype == "bfloat16" else 4
    models = [(run.model, 3 + run.remat)]
    if isinstance(build.teacher, Architecture):
        models.append((build.teacher.config, 1))
    moved = (
        passes * 3 * tower.layers * _block(tower) * rows * tokens * tower.width * itemsize
        for config, passes in models
        for tower, tokens in _towers(config)
    )
    return int(sum(moved))


def _collectives(build: Build) -> Iterator[Collective]:
    """Weights gathered over `fsdp` for each pass, gradients reduced, embeddings of the batch gathered and returned."""
    run, mesh = build.run, build.mesh.shape
    dtype, fsdp, tensor = _XLA[run.dtype], mesh["fsdp"], mesh["tensor"]
    student = _elements(build.state_shapes.params["clip"]) // tensor
    if fsdp > 1:
        # What moves of a ternary weight is four trits a byte; its scales are few.
        trits = 0 if run.ternary_warmup_steps else _ternary_elements(build) // tensor
        floats, packed = Array(dtype, (student - trits,)), Array("u8", (trits // 4,))
        for array in (floats, packed):
            if array.size:
                yield Collective("all-gather", (array,), ("fsdp",), fsdp, 2 + run.remat, "weights")
        if build.teacher_shapes is not None:
            theirs = (Array(dtype, (_elements(build.teacher_shapes) // tensor,)),)
            yield Collective("all-gather", theirs, ("fsdp",), fsdp, 1, "the teacher's weights")
        yield Collective("reduce-scatter", (Array("f32", (student,)),), ("fsdp",), fsdp, 1, "gradients")
    if mesh["data"] > 1:
        shard = (Array("f32", (student // fsdp,)),)
        yield Collective("all-reduce", shard, ("data",), mesh["data"], 1, "gradients")
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    if shards > 1:
        embeddings = (Array("f32", (2, run.data.batch_size, run.model.embed_dim)),)
        for kind, name in (("all-gather", "embeddings"), ("reduce-scatter", "their gradients")):
            yield Collective(kind, embeddings, BATCH_AXES, shards, 1, name)
    if mesh["tensor"] > 1:
        for tower, tokens in _towers(run.model):
            state = (Array("f32", (_rows(build), tokens, tower.width)),)
            times = tower.layers * 2 * (2 + run.remat)  # after attention and the MLP, in each pass
            yield Collective("all-reduce", state, ("tensor",), mesh["tensor"], times, "partial sums")


def _ternary_elements(build: Build) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(build.state_shapes.params["clip"])
    return sum(
        math.prod(leaf.shape)
        for path, leaf in leaves
        if path_of(path) in TERNARIZABLE and find_quantizer(path_of(path), build.run.rules)
    )


def _elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
