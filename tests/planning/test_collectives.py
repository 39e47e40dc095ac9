"""Collectives and HBM traffic: snippets of each notation of XLA, and a compiled program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.planning.collectives import Collective, carries_activations, find_collectives, memory_traffic
from tclip_jax.planning.hlo import Array, parse_program

MESH = {"data": 4, "fsdp": 2}


def test_an_asynchronous_collective_counts_once_per_trip(loop: str) -> None:
    gather, scatter = find_collectives(parse_program(loop), MESH)
    assert (gather.kind, gather.dtype, gather.axes, gather.devices, gather.times) == (
        *("all-gather", "bf16", ("fsdp",)),
        *(2, 12),
    )
    assert gather.name == "jit(step)/blocks/mlp/fc1"
    assert gather.is_async and not scatter.is_async
    assert gather.bytes == 12 * 64 * 64 * 2 and gather.sent_bytes == gather.bytes / 2
    # Programs for TPUs write a reduce-scatter as a slice of an all-reduce.
    assert (scatter.kind, scatter.axes, scatter.times, scatter.bytes) == ("reduce-scatter", ("fsdp",), 1, 4096)
    assert Collective.from_json(gather.to_json()) == gather


SPARSE_CORE = """
%called_computation.7 (p.1: bf16[1,64,16]) -> bf16[1,64,32] {
  %p.1 = bf16[1,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups=[4,2]<=[8], \
dimensions={2}, metadata={op_name="jit(step)/blocks/mlp/fc1"}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[1,64,16]) -> bf16[1,64,32] {
  %x = bf16[1,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3.call-start = ((bf16[1,64,16]{2,1,0:T(8,128)(2,1)}), bf16[1,64,32]{2,1,0:T(8,128)(2,1)}, u32[]{:S(8)}) \
call-start(%x), async_execution_thread="sparsecore", to_apply=%called_computation.7
  ROOT %all-gather.3.call-done = bf16[1,64,32]{2,1,0:T(8,128)(2,1)} call-done(%all-gather.3.call-start)
}
"""


def test_a_collective_of_a_sparse_core_counts_once_and_is_asynchronous() -> None:
    """tpu7x: what runs on SparseCores is a computation of its own, between call-start and call-done."""
    program = parse_program(SPARSE_CORE)
    (gather,) = find_collectives(program, MESH)
    assert (gather.kind, gather.axes, gather.times, gather.is_async) == ("all-gather", ("fsdp",), 1, True)
    assert gather.bytes == 64 * 32 * 2 and gather.name == "jit(step)/blocks/mlp/fc1"
    assert memory_traffic(program, {}) == 64 * 16 * 2 + 64 * 32 * 2


def test_a_collective_that_is_called_in_an_unknown_way_is_an_error() -> None:
    text = SPARSE_CORE.replace(" call-start(", " new-start(")
    with pytest.raises(ValueError, match=r"has all-gather all-gather.3 in called_computation.7, of which no call"):
        find_collectives(parse_program(text), MESH)


@pytest.mark.parametrize(
    ("groups", "axes", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("fsdp",), 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data",), 4),
        ("replica_groups={}", ("data", "fsdp"), 8),
        ("replica_groups=[4,2]<=[8]", ("fsdp",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data",), 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ("data",), 4),
        ("replica_groups=mesh['a'=8] {'a'}", ("data", "fsdp"), 8),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ("fsdp",), 2),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", ("data",), 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data",), 4),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("data",), 4),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", ("fsdp",), 2),
    ],
)
def test_the_axes_of_groups(single: Callable[[str], str], groups: str, axes: tuple[str, ...], devices: int) -> None:
    text = single(f"%all-reduce.1 = f32[2]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add")
    (collective,) = find_collectives(parse_program(text), MESH)
    assert (collective.axes, collective.devices) == (axes, devices)
    assert collective.sent_bytes == 2 * 8 * (devices - 1) / devices


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "all-gather", 24),
        ("f32[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "reduce-scatter", 24),
        ("f32[2]{0} collective-permute(%x), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", "collective-permute", 8),
        ("f32[8]{0} all-to-all(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "all-to-all", 24),
        # Notation of programs for GPUs.
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0)", "all-gather", 24),
        ("f32[2]{0} all-reduce-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add", "all-reduce", 12),
        (
            "(f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,2},{2,0}}",
            *("collective-permute", 8),
        ),
    ],
)
def test_bytes_that_a_device_sends(single: Callable[[str], str], line: str, kind: str, sent: float) -> None:
    (collective,) = find_collectives(parse_program(single(f"%c.1 = {line}")), MESH)
    assert (collective.kind, collective.axes, collective.sent_bytes) == (kind, ("data",), sent)


def test_groups_of_one_device_send_nothing(single: Callable[[str], str]) -> None:
    text = single("%all-reduce.1 = f32[2]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add")
    assert find_collectives(parse_program(text), MESH) == []


def test_a_compiled_program_on_eight_devices() -> None:
    mesh = make_mesh(4, 2)

    def step(w_LKN: jax.Array, x_BK: jax.Array) -> jax.Array:
        def layer(x_BK: jax.Array, w_KN: jax.Array) -> tuple[jax.Array, None]:
            w_KN = jax.lax.with_sharding_constraint(w_KN, PartitionSpec())
            return jax.lax.with_sharding_constraint(jnp.tanh(x_BK @ w_KN), PartitionSpec(("data", "fsdp"))), None

        return jax.lax.scan(layer, x_BK, w_LKN)[0].sum()

    with jax.set_mesh(mesh):
        shapes = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
            for shape, spec in (((3, 32, 32), (None, None, "fsdp")), ((16, 32), (("data", "fsdp"),)))
        ]
        text = jax.jit(step).lower(*shapes).compile().as_text()
    gathers, sums = find_collectives(parse_program(text), dict(mesh.shape))
    assert (gathers.kind, gathers.axes, gathers.devices, gathers.times) == ("all-gather", ("fsdp",), 2, 3)
    assert gathers.bytes == 3 * 32 * 32 * 4
    assert (sums.kind, sums.axes, sums.devices, sums.bytes) == ("all-reduce", ("data", "fsdp"), 8, 4)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ((128, 197, 768), True),  # a device's part of the batch
        ((2048, 197, 768), True),
        ((128 * 197, 768), True),
        ((128, 12, 197, 64), True),
        ((197, 768), False),  # position embedding
        ((64, 197, 768), False),  # fewer rows than any device has
        ((12, 768, 3072), False),
        ((32768, 512), False),
        ((1, 768, 197 * 128), False),  # the shape of a weight
    ],
)
def test_which_arrays_are_activations(dims: tuple[int, ...], expected: bool) -> None:
    collective = Collective("all-gather", (Array("bf16", dims),), ("fsdp",), 16, 1, "")
    sizes, weights = {197 * 768, 197 * 3072, 77 * 512, 77 * 2048}, {(768, 197 * 128)}
    if dims == (128 * 197, 768):
        weights = set()
    assert carries_activations(collective, sizes, 32768, 128, weights) is expected


def test_embeddings_as_large_as_activations_of_a_part_of_the_batch_are_known_by_their_shape() -> None:
    """SigLIP: 32,768 embeddings of width 768 are as many numbers as 64 tokens of width 768 of 512 texts."""
    collective = Collective("all-gather", (Array("f32", (32768, 768)),), ("data",), 16, 1, "")
    assert carries_activations(collective, {64 * 768}, 32768, 128)
    assert not carries_activations(collective, {64 * 768}, 32768, 128, {(768, 32768)})


def test_a_loop_reads_one_slice_per_trip_and_no_array_on_the_chip(loop: str) -> None:
    slices = 12 * 64 * 32 * 2  # the results are on the chip, so HBM is only read
    negations = 12 * 2 * 8 * 128 * 4
    scattered = (8 * 128 + 4 * 128) * 4
    counters = 8 + 12 * 4  # copied before the loop, and read by each slice
    assert memory_traffic(parse_program(loop), {}) == slices + negations + scattered + counters


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("f32[2]{0} negate(%x)", 16),
        ("f32[2]{0:T(128)S(1)} negate(%x)", 8),
        ("f32[1]{0} dynamic-slice(%x), dynamic_slice_sizes={1}", 8),
        ("(f32[2]{0:S(1)}, f32[2]{0}, u32[]{:S(2)}) copy-start(%x)", 8),
        ("((f32[2]{0}), f32[1]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}", 4),
        ("f32[2]{0} bitcast(%x)", 0),
        ("f32[2]{0} copy-done(%x)", 0),
        ('f32[12,2]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        ('f32[2]{0} custom-call(%x), custom_call_target="Other"', 16),
    ],
)
def test_the_traffic_of_instructions(single: Callable[[str], str], line: str, moved: int) -> None:
    assert memory_traffic(parse_program(single(f"%a.1 = {line}")), {}) == moved


UPDATE = """\
%update (p.0: f32[12,8], p.1: f32[8], p.2: s32[]) -> f32[12,8] {
  %p.0 = f32[12,8]{1,0} parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %c.0 = s32[] constant(0)
  %b.0 = f32[1,8]{1,0} bitcast(%p.1)
  ROOT %u.0 = f32[12,8]{1,0} dynamic-update-slice(%p.0, %b.0, %p.2, %c.0)
}

%outer (p.3: f32[12,8], p.4: f32[8], p.5: s32[]) -> (f32[12,8], f32[8]) {
  %p.3 = f32[12,8]{1,0} parameter(0)
  %p.4 = f32[8]{0} parameter(1)
  %p.5 = s32[] parameter(2)
  %f.0 = f32[12,8]{1,0} fusion(%p.3, %p.4, %p.5), kind=kLoop, calls=%update
  ROOT %t.0 = (f32[12,8]{1,0}, f32[8]{0}) tuple(%f.0, %p.4)
}

ENTRY %main (a: f32[12,8], b: f32[8], i: s32[]) -> (f32[12,8], f32[8]) {
  %a = f32[12,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f.1 = (f32[12,8]{1,0}, f32[8]{0}) fusion(%a, %b, %i), kind=kLoop, calls=%CALLED
}
"""


@pytest.mark.parametrize("called", ["update", "outer"])
def test_an_update_in_place_moves_only_the_updated_slice(called: str) -> None:
    update, index = 8 * 4, 4
    assert memory_traffic(parse_program(UPDATE.replace("CALLED", called)), {}) == 2 * update + index
