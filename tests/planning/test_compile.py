"""The facts of a training step, compiled for simulated devices of a CPU."""

from __future__ import annotations

import math
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from tclip_jax.parallel.mesh import AXES, make_mesh
from tclip_jax.planning.collectives import Collective, carries_activations
from tclip_jax.planning.compile import activation_sizes, compile_step, count_links, weight_shapes
from tclip_jax.planning.estimate import StepFacts
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import run_config
from tclip_jax.training.build import Build


def build_of(config: ml_collections.ConfigDict) -> Build:
    run = run_config(config)
    return Build(run, make_mesh(4, 2), find_teacher(run))


def elements(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_step_on_eight_devices(config: ml_collections.ConfigDict) -> None:
    config.model.vision_cfg.layers = 2  # the same loops as three
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        build = build_of(config)
        facts = compile_step(build)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert facts.mesh == {"data": 4, "fsdp": 2, "tensor": 1} and facts.links == {}
    state = build.state_shapes
    whole = 4 * elements(state.params)
    assert whole / 2 < facts.memory.parameters < 0.51 * whole + 4  # everything except vectors is sharded in two
    assert facts.memory.optimizer == pytest.approx(2 * facts.memory.parameters, rel=1e-3)
    assert facts.memory.average == 0 and facts.memory.padding == 0
    rows = 64 // 8
    assert facts.memory.batch == rows * (32 * 32 * 3 + 4 * 32 + 4 + 4)  # weight and fault
    assert facts.memory.temporaries > 0 and facts.traffic > facts.memory.total
    gathers = [each for each in facts.collectives if each.kind == "all-gather" and each.axes == ("fsdp",)]
    assert {each.times for each in gathers} >= {2, 3}  # layers of the towers, the teacher's among them
    assert all(each.sent_bytes > 0 for each in facts.collectives)
    # Weights are gathered as four trits per byte, such as fc1 of shape (64, 256). Activations are not gathered.
    assert (16, 256) in {array.dims for each in gathers if each.dtype == "u8" for array in each.arrays}
    assert facts.moving_activations == ()
    assert facts.at_peak and facts.at_peak.total <= facts.memory.total
    table = next(
        each for each in facts.at_peak.arrays if each.name == "state/params/clip/text/token_embedding/embedding"
    )
    assert table.array == Array("f32", (49408 // 2, 64)) and table.bytes == 49408 // 2 * 64 * 4
    assert StepFacts.from_json(facts.to_json()) == facts


def test_activations_are_distinguished_from_weights(config: ml_collections.ConfigDict) -> None:
    build = build_of(config)
    sizes, weights = activation_sizes(build), weight_shapes(build)

    def carries(*dims: int) -> bool:
        return carries_activations(
            Collective("all-gather", (Array("bf16", dims),), (), 2, 1, ""), sizes, 64, 8, weights
        )

    assert carries(32, 32, 64) and carries(16, 17, 256) and carries(16 * 17, 192)
    # Gathered and sharded weights of one layer and of all.
    assert not any(carries(*dims) for dims in ((64, 256), (1, 256, 32), (3, 64, 192), (49408, 64), (24704, 64)))
    assert not carries(64, 64)  # embeddings


def test_links_of_a_torus() -> None:
    class Device:
        def __init__(self, *coords: int) -> None:
            self.coords = coords

    chips = np.array([[Device(x, y, 0) for y in range(16)] for x in range(16)])
    topology, axes = parse_topology("v5e:16x16"), [("data",), ("fsdp",), ("data", "fsdp"), ("tensor",)]
    mesh: Any = type("", (), {"devices": chips[..., None], "axis_names": AXES})
    assert count_links(mesh, topology, axes) == {"data": 2, "fsdp": 2, "data+fsdp": 4, "tensor": 0}
    # Eight of sixteen chips do not close to a ring.
    halves: Any = type("", (), {"devices": chips.reshape(32, 8, 1), "axis_names": AXES})
    assert count_links(halves, topology, axes) == {"data": 3, "fsdp": 1, "data+fsdp": 4, "tensor": 0}
