"""Facts of a step before it runs: memory, HBM traffic and collectives, from the compiled program or by formula.

Plans for GPUs are estimated by formula, so they are less exact than compiled plans for TPUs. Sharding is exact, since
the formulas use the sharding rules of training. Activations are those of a transformer. Where `models.attention` has no
fused attention for GPUs, its logits are arrays in HBM. With remat, each layer stores one hidden state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tclip_jax.inference.load import Architecture
from tclip_jax.models.attention import unsupported_by_cudnn
from tclip_jax.models.config import TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import TERNARIZABLE, find_quantizer
from tclip_jax.parallel.mesh import BATCH_AXES, abstract_mesh
from tclip_jax.parallel.sharding import path_of
from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.hardware import Topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.liveness import Peak
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import RunConfig
from tclip_jax.training.build import Build, check_batch


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of memory on each device during a step.

    Attributes:
      parameters, optimizer, average, teacher, batch: inputs of the step, by shapes and shardings. The new state (the
        first three) uses the same memory.
      padding: added by the compiler, which stores arrays in tiles.
      temporaries: maximum of activations, gradients and gathered weights during the step.
      outputs: metrics.
      program: compiled instructions.
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
    """Return the bytes of the inputs of a step on each device, keyed by the first five fields of `Memory`."""
    state = build.state_shapes
    return {
        "parameters": device_bytes((state.params, state.step)),
        "optimizer": device_bytes(state.optimizer),
        "average": device_bytes(state.average),
        "teacher": device_bytes(build.teacher_shapes),
        "batch": device_bytes(build.batch_shapes),
    }


def device_bytes(tree: Any) -> int:
    """Return the bytes that each device holds of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_memory(compiled: Any, arguments: dict[str, int]) -> Memory:
    """Read the memory statistics of the compiler.

    Args:
      compiled: the step, a jax.stages.Compiled.
      arguments: bytes of its inputs, as `argument_bytes` returns them.
    """
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
    """Memory, traffic and collectives of one step on one device.

    Attributes:
      how: "compiled" or "by formula".
      mesh: name of axis -> size.
      memory: allocated bytes, by content.
      peak: the compiler's maximum of live bytes, without fragmentation; 0 by formula. It is the sum of the inputs and
        of the temporaries in HBM or, if those are more, on the chip. `memory.total` is the allocated size.
      traffic: bytes to and from HBM.
      collectives: the largest first.
      moving_activations: descriptions of collectives that carry a batch x sequence x width array.
      links: mesh axes joined by "+" -> links of a device that a ring over these axes uses at once.
      seconds: compile time.
      kernel_flops: FLOPs of Pallas kernels, with the padding of the matrix unit; 0 by formula.
      attention: tower, such as "student image" -> implementation of its attention, and the reason; {} by formula.
      at_peak: what HBM contains when most of it is in use; None by formula.
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
    kernel_flops: int = 0
    attention: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    at_peak: Peak | None = None

    def to_json(self) -> dict[str, Any]:
        collectives = [each.to_json() for each in self.collectives]
        return dataclasses.asdict(self) | {
            "collectives": collectives,
            "at_peak": self.at_peak and self.at_peak.to_json(),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> StepFacts:
        return cls(
            **{
                **fields,
                "memory": Memory(**fields["memory"]),
                "collectives": tuple(map(Collective.from_json, fields["collectives"])),
                "attention": {tower: tuple(choice) for tower, choice in fields["attention"].items()},
                "moving_activations": tuple(fields["moving_activations"]),
                "at_peak": fields["at_peak"] and Peak.from_json(fields["at_peak"]),
            }
        )


_XLA = {"bfloat16": "bf16", "float32": "f32"}


def formula_facts(run: RunConfig, topology: Topology, teacher_preset: str = "") -> StepFacts:
    """Estimate the facts of a run's step on GPUs.

    Args:
      run: the run.
      topology: type and number of GPUs.
      teacher_preset: see `find_teacher`.

    Raises:
      ValueError: the mesh or the batch does not fit the devices, or the architecture of the teacher is unknown.
    """
    for tower, _ in run.model.towers.values():
        reason = "it is for TPUs" if run.attention == "mosaic_tpu" else None
        if run.attention == "cudnn":
            reason = unsupported_by_cudnn(tower.width // tower.heads, run.dtype)
        if reason:
            raise ValueError(f"config.attention {run.attention!r} cannot run on {topology.name}: {reason}")
    # Shapes and shardings need no devices.
    mesh: Any = abstract_mesh(topology.devices, run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    check_batch(run, mesh)
    build = Build(run, mesh, find_teacher(run, teacher_preset))
    memory = formula_memory(build)
    collectives = tuple(sorted(_collectives(build), key=lambda each: -each.sent_bytes))
    return StepFacts(
        how="by formula",
        mesh=dict(mesh.shape),
        memory=memory,
        peak=0,
        # The step reads and writes the state.
        traffic=2 * (memory.parameters + memory.optimizer + memory.average) + _activations(build),
        collectives=collectives,
        moving_activations=(),
        links={},
        seconds=0.0,
    )


def formula_memory(build: Build) -> Memory:
    """Estimate the memory of a step on each device: exact for its inputs, by formula for activations and gradients."""
    return Memory(**argument_bytes(build), padding=0, temporaries=_temporaries(build), outputs=0, program=0)


def _rows(build: Build) -> int:
    """Return the number of samples per device, or per group of devices along `tensor`."""
    return build.run.data.batch_size // math.prod(build.mesh.shape[axis] for axis in BATCH_AXES)


def _block(tower: VisionConfig | TextConfig, tokens: int, run: RunConfig) -> float:
    """Return bytes per row of the activations that a block stores for its backward pass.

    Two norms, queries, keys, values and the attention output are six arrays of the width; the MLP stores its hidden
    layer twice. Attention that is not fused stores its logits in float32, and its weights.

    Args:
      tower: the tower of the block.
      tokens: length of the sequence.
      run: the run, for its dtype and the implementation of its attention.
    """
    itemsize = 2 if run.dtype == "bfloat16" else 4
    fused = run.attention != "reference" and not unsupported_by_cudnn(tower.width // tower.heads, run.dtype)
    logits = 0 if fused else tower.heads * tokens**2 * (4 + itemsize)
    return (6 + 2 * tower.mlp_ratio) * tokens * tower.width * itemsize + logits


def _temporaries(build: Build) -> int:
    """Return bytes of stored activations, the largest block in use, gradients, and similarities of the loss."""
    run, parts = build.run, build.run.data.microbatches
    rows = _rows(build) // parts
    itemsize = 2 if run.dtype == "bfloat16" else 4
    stored = working = 0.0
    for tower, tokens in run.model.towers.values():
        block = _block(tower, tokens, run)
        stored += rows * tower.layers * (tokens * tower.width * itemsize if run.remat else block)
        working = max(working, rows * block)
    if isinstance(build.teacher, Architecture):
        blocks = (_block(tower, tokens, run) for tower, tokens in build.teacher.config.towers.values())
        working = max(working, rows * max(blocks))
    gradients = device_bytes(build.state_shapes.params) * (2 if parts > 1 else 1)  # a part's, and their sum
    # Similarities of images with texts and of texts with images of the global batch, and their gradients, in float32.
    similarities = 4 * 4 * _rows(build) * run.data.batch_size
    return int(stored + working + gradients + similarities)


def _activations(build: Build) -> int:
    """Return the HBM traffic of activations in bytes: a pass writes and reads each array of a block once."""
    run, rows = build.run, _rows(build)
    models = [(run.model, 1 + _passes(run))]  # the backward pass moves twice as much
    if isinstance(build.teacher, Architecture):
        models.append((build.teacher.config, 1))
    traffic = (
        2 * passes * tower.layers * rows * _block(tower, tokens, run)
        for config, passes in models
        for tower, tokens in config.towers.values()
    )
    return int(sum(traffic))


def _passes(run: RunConfig) -> int:
    """Return how often a step passes the student's layers: forward, backward, and again for remat or microbatches."""
    return 2 + run.remat + (run.data.microbatches > 1)


def _collectives(build: Build) -> Iterator[Collective]:
    """Yield the collectives of weights, gradients, embeddings, and partial sums of tensor parallelism."""
    run, mesh = build.run, build.mesh.shape
    dtype, fsdp, tensor, parts = _XLA[run.dtype], mesh["fsdp"], mesh["tensor"], run.data.microbatches
    student = _elements(build.state_shapes.params["clip"]) // tensor
    if fsdp > 1:
        # Quantized weights are gathered packed, as four trits per byte. Their scales are small and not counted.
        soft = run.ternary_warmup_steps or run.ternary_anneal_steps
        count, size = (0, 0) if soft else _quantized(build)
        floats, packed = Array(dtype, (student - count // tensor,)), Array("u8", (size // tensor,))
        for array in (floats, packed):
            if array.size:
                yield Collective("all-gather", (array,), ("fsdp",), fsdp, parts * _passes(run), "weights")
        if build.teacher_shapes is not None:
            weights = (Array(dtype, (_elements(build.teacher_shapes) // tensor,)),)
            yield Collective("all-gather", weights, ("fsdp",), fsdp, parts, "the teacher's weights")
    for gradients, count in _gradients(build).items():
        if fsdp > 1:
            whole = (Array(gradients, (count // tensor,)),)
            yield Collective("reduce-scatter", whole, ("fsdp",), fsdp, parts, "gradients")
        if mesh["data"] > 1:
            shard = (Array(gradients, (count // tensor // fsdp,)),)
            yield Collective("all-reduce", shard, ("data",), mesh["data"], parts, "gradients")
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    if shards > 1:
        embeddings = (Array("f32", (2, run.data.batch_size, run.model.embed_dim)),)
        for kind, name in (("all-gather", "embeddings"), ("reduce-scatter", "gradients of embeddings")):
            yield Collective(kind, embeddings, BATCH_AXES, shards, 1, name)
    if mesh["tensor"] > 1:
        for tower, tokens in run.model.towers.values():
            hidden = (Array("f32", (_rows(build), tokens, tower.width)),)
            times = tower.layers * 2 * _passes(run)  # after attention and after the MLP, in each pass
            yield Collective("all-reduce", hidden, ("tensor",), mesh["tensor"], times, "partial sums")


def _gradients(build: Build) -> dict[str, int]:
    """Number of parameters by the dtype in which devices add their gradients."""
    counts: dict[str, int] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(build.state_shapes.params["clip"]):
        is_matrix = "/blocks/" in path_of(key_path) and path_of(key_path).endswith("/kernel")
        dtype = _XLA[build.run.gradient_dtype] if is_matrix else "f32"
        counts[dtype] = counts.get(dtype, 0) + math.prod(leaf.shape)
    return counts


def _quantized(build: Build) -> tuple[int, int]:
    """Number of quantized weights, and their bytes when packed."""
    count, bits = 0, 0
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(build.state_shapes.params["clip"]):
        path = path_of(key_path)
        quantizer = find_quantizer(path, build.run.rules) if path in TERNARIZABLE else None
        if quantizer:
            count += math.prod(leaf.shape)
            bits += math.prod(leaf.shape) * quantizer.stored_bits
    return count, bits // 8


def _elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
