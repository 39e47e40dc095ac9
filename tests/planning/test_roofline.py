"""The estimate of a step against a calculation by hand; topologies and chips."""

from __future__ import annotations

import pytest

from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.estimate import Memory, StepFacts
from tclip_jax.planning.hardware import GPUS, TPUS, Topology, parse_topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.roofline import assumptions, estimate

MEMORY = Memory(1, 2, 3, 4, 5, 6, 7, 8, 9)


def facts(mesh: dict[str, int], links: dict[str, int], *collectives: Collective, traffic: int = 0) -> StepFacts:
    return StepFacts("compiled", mesh, MEMORY, 45, traffic, collectives, (), links, 1.0)


def test_a_step_on_a_pod_of_v5e() -> None:
    # 1.6e9 bytes over 16 devices: a ring with two links of 50 GB/s sends 15/16 of the bytes.
    gather = Collective("all-gather", (Array("bf16", (800_000_000,)),), ("fsdp",), 16, 1, "")
    step = facts({"data": 16, "fsdp": 16}, {"fsdp": 2}, gather, traffic=81_900_000_000)
    result = estimate(
        step,
        parse_topology("v5e:16x16"),
        batch=25_600,
        steps=36_000,
        pair_flops=1.97e12,
        model_flops=0.985e12,
        price=1.2,
        efficiency=0.4,
    )
    assert result.flops == pytest.approx(197e12)  # 100 pairs per device
    assert result.compute == pytest.approx(1.0)
    assert result.memory == pytest.approx(0.1)
    assert result.network == pytest.approx(1.5e9 / 100e9)
    assert result.serial == pytest.approx(1.115) and result.bound_by == "compute"
    fast, slow = result.fast, result.slow
    assert fast.seconds == pytest.approx(1.0) and fast.mfu == pytest.approx(0.5)
    assert fast.images_per_second == pytest.approx(25_600) and fast.hours == pytest.approx(10)
    assert fast.chip_hours == pytest.approx(2560) and fast.cost == pytest.approx(3072)
    # Products at 40 % of the peak rate take 2.5 s, longer than everything one after another.
    assert slow.seconds == pytest.approx(2.5) and slow.mfu == pytest.approx(0.2) and slow.cost == pytest.approx(7680)
    assert slow.images_per_second == pytest.approx(10_240) and slow.hours == pytest.approx(25)


def test_the_slow_end_is_never_faster_than_everything_one_after_another() -> None:
    step = facts({"data": 1}, {}, traffic=819_000_000_000)
    time = estimate(step, parse_topology("v5e:1x1"), batch=1, steps=1, pair_flops=197e12, model_flops=1)
    assert time.serial == pytest.approx(2.0) and time.slow.seconds == pytest.approx(2.0) and time.efficiency == 0.5
    step = facts({"data": 1}, {}, traffic=2 * 819_000_000_000)
    time = estimate(step, parse_topology("v5e:1x1"), batch=1, steps=1, pair_flops=197e12, model_flops=1)
    assert time.slow.seconds == pytest.approx(3.0) and time.bound_by == "HBM"


def test_half_a_chip_has_half_of_the_memory_bandwidth_and_of_the_links() -> None:
    reduce = Collective("all-reduce", (Array("f32", (128,)),), ("data",), 128, 1, "")
    step = facts({"data": 128}, {"data": 6}, reduce, traffic=7_370_000_000)
    result = estimate(step, parse_topology("tpu7x:4x4x4"), batch=128, steps=1, pair_flops=1.1535e15, model_flops=1.0)
    assert result.compute == pytest.approx(1.0) and result.memory == pytest.approx(0.002)
    assert result.network == pytest.approx(2 * 512 * 127 / 128 * 2 / (6 * 200e9))
    assert result.fast.chip_hours == pytest.approx(64 * result.fast.hours) and result.fast.cost is None


def test_gpus_use_nvlink_within_a_node_and_the_network_between_nodes() -> None:
    mesh = {"data": 8, "fsdp": 8}
    within = Collective("all-gather", (Array("bf16", (4000,)),), ("fsdp",), 8, 1, "")
    across = Collective("all-gather", (Array("bf16", (4000,)),), ("data", "fsdp"), 64, 1, "")
    times = [
        estimate(facts(mesh, {}, each), parse_topology("h100:64"), batch=64, steps=1, pair_flops=1, model_flops=1)
        for each in (within, across)
    ]
    assert times[0].network == pytest.approx(7000 / 450e9) and times[1].network == pytest.approx(7875 / 50e9)


def test_memory_is_the_sum_of_its_parts() -> None:
    assert MEMORY.total == 45


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [
        ("v5e:16x16", 256, 256),
        ("v5e:16x32", 512, 512),
        ("v6e:32x16", 512, 512),
        ("v4:12x16x16", 3072, 3072),
        ("v5p:16x16x16", 4096, 4096),
        ("v5p:8x8x4", 256, 256),
        ("tpu7x:4x4x4", 64, 128),
        ("h100:64", 64, 64),
    ],
)
def test_topologies(name: str, chips: int, devices: int) -> None:
    topology = parse_topology(name)
    assert (topology.chips, topology.devices, topology.name) == (chips, devices, name)


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-1", "v5e:1x1"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5e-16", "v5e:4x4"),
        ("v6e-16", "v6e:4x4"),
        # These count TensorCores, of which a chip has two.
        ("v4-8", "v4:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("v4-256", "v4:4x4x8"),
        ("v4-2048", "v4:8x8x16"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-3072", "v5p:8x12x16"),
        ("tpu7x-128", "tpu7x:4x4x4"),
        # SkyPilot's names.
        ("tpu-v5litepod-16", "v5e:4x4"),
        ("H100:8", "h100:8"),
        ("A100-80GB:8", "a100:8"),
    ],
)
def test_accelerator_types_of_the_launchers(name: str, topology: str) -> None:
    parsed = parse_topology(name)
    assert parsed.name == topology
    assert parsed.accelerator_type in (name.removeprefix("tpu-"), "v5litepod-16", "")


def test_a_slice_of_another_shape_than_its_accelerator_type_has_none() -> None:
    assert parse_topology("v4:4x4x16").accelerator_type == ""  # v4-512 is 4x8x8
    assert parse_topology("v5e:16x32").accelerator_type == ""  # more than a pod


@pytest.mark.parametrize(
    "name",
    [
        "v4-4",
        "v4-9",
        "v5litepod-12",
        "v5litepod-512",
        "v5p-x",
        "v4-",
        "h100-8",
        "v5e",
        "v5e:",
        "v5e:3x3",
        "v5e:16x16x16",
        "v5p:16x16x24",
        "v7x:4x4x4",
        "v5e:２x2",
        "h100:0",
        "h100:8x8",
        "",
    ],
)
def test_an_unknown_topology_is_refused_with_what_may_be_written(name: str) -> None:
    choices = {
        "v5e": "write v5litepod-16 for 16 chips, or v5e: with a shape: 1x1, 2x2, .*16x32",
        "v5l": "write v5litepod-16 for 16 chips, or v5e: with a shape: 1x1, 2x2, .*16x32",
        "v4-": "write v4-32 for 16 chips of 2 TensorCores, or v4: with a shape: 2x2x1, .*, such as 8x8x16",
        "v5p": "write v5p-32 for 16 chips of 2 TensorCores, or v5p: with a shape: 2x2x1, .*, such as 8x8x16",
        "h10": "write h100:N for N GPUs, 1 to 4,096, such as h100:64",
    }
    every = "choose from v5e, v6e: 1x1, 2x2, .*16x32.*8x8x16; a100, h100, h200: a number"
    with pytest.raises(ValueError, match=f"there is no topology '{name}': {choices.get(name[:3], every)}"):
        parse_topology(name)


def test_every_chip_has_a_peak_and_a_source() -> None:
    for kind, chip in (TPUS | GPUS).items():
        assert chip.peak_flops > 1e14 and chip.source.startswith("https://")
        lines = assumptions(Topology(kind, (1,)), facts({"data": 1}, {"data": 2}))
        assert chip.source in lines[0] and f"{chip.memory / 2**30:.1f} GiB" in lines[0]


def test_int8_products_take_half_the_time_where_the_chip_has_them() -> None:
    for name, seconds in (("v5e:1x1", 0.75), ("v4:2x2x1", 4 * 0.197 / 0.275)):
        topology = parse_topology(name)
        step = facts({"data": topology.devices}, {})
        batch = topology.devices * 4 if topology.devices > 1 else 1
        time = estimate(step, topology, batch=batch, steps=1, pair_flops=197e12, model_flops=1, int8_flops=98.5e12)
        assert time.compute == pytest.approx(seconds)
        assert time.flops == pytest.approx(197e12 * batch / topology.devices)
