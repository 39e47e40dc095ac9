"""Every parameter's sharding, against a golden file: a misspelt rule would replicate in silence.

shardings.json holds the PartitionSpec of every parameter of every preset on the mesh data=4, fsdp=2. After a change
that is meant, write it anew and read the difference:

    TCLIP_UPDATE_GOLDEN=1 pytest tests/parallel/test_rules.py
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS, model_cfg
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.rules import RULES, partition_spec, path_of, tree_shardings
from tclip_jax.training.config import LossConfig, OptimizerConfig
from tclip_jax.training.heads import init_heads
from tclip_jax.training.optimizer import make_optimizer
from tclip_jax.training.state import TrainState

TINY = CLIPConfig.from_open_clip(model_cfg("tiny"))
GOLDEN = pathlib.Path(__file__).with_name("shardings.json")


@functools.cache
def shapes(preset: str) -> dict[str, Any]:
    return param_shapes(CLIPConfig.from_open_clip(model_cfg(preset)))


def by_path(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def specs(preset: str) -> dict[str, list[str | None]]:
    shardings = by_path(tree_shardings(shapes(preset), make_mesh(4, 2)))
    return {path: list(sharding.spec) for path, sharding in shardings.items()}


def write_golden() -> None:
    presets = []
    for preset in PRESETS:
        lines = ",\n".join(f"    {json.dumps(path)}: {json.dumps(spec)}" for path, spec in specs(preset).items())
        presets.append(f"  {json.dumps(preset)}: {{\n{lines}\n  }}")
    GOLDEN.write_text("{\n" + ",\n".join(presets) + "\n}\n")


if os.environ.get("TCLIP_UPDATE_GOLDEN"):
    write_golden()


@pytest.mark.parametrize("preset", PRESETS)
def test_shardings_are_the_golden_ones(preset: str) -> None:
    assert specs(preset) == json.loads(GOLDEN.read_text())[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_device_holds_its_share_of_the_weights(preset: str) -> None:
    mesh = make_mesh(1, 8)
    held = sum(
        np.prod(NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)).shard_shape(leaf.shape))
        for path, leaf in by_path(shapes(preset)).items()
    )
    assert 1 / 8 <= held / sum(leaf.size for leaf in jax.tree.leaves(shapes(preset))) < 1 / 8 + 0.01


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in RULES])
def test_every_rule_decides_for_some_parameter(pattern: str) -> None:
    heads = jax.eval_shape(lambda key: init_heads(key, TINY, 96, LossConfig()), jax.random.key(0))
    trees = {"clip": shapes("tiny"), "heads": heads}
    first = [next(p for p, _ in RULES if re.search(rf"(?:^|/){p}$", path)) for path in by_path(trees)]
    assert pattern in first


def test_a_shard_never_cuts_a_group_of_weights_that_share_a_scale() -> None:
    for path, spec in specs("ViT-B-16").items():
        if path.endswith("/kernel") and "patch_embedding" not in path:
            assert spec[-2] is None and spec[-1] == "fsdp", path
    assert specs("ViT-B-16")["text/token_embedding/embedding"] == ["fsdp", None]


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("image/blocks/mlp/fc1/kernel", (2, 8, 32), PartitionSpec(None, None, "fsdp")),
        ("image/blocks/mlp/fc1/kernel", (2, 8, 33), PartitionSpec(None, None, None)),  # 2 does not divide 33
        ("text/token_embedding/embedding", (50, 8), PartitionSpec("fsdp", None)),
        ("heads/image/kernel", (8, 16), PartitionSpec(None, "fsdp")),
        ("heads/image/bias", (16,), PartitionSpec()),
        ("heads/icl_scale", (), PartitionSpec()),
        ("image/blocks/mlp/fc1/bias", (2, 32), PartitionSpec()),
        ("image/myprojection/kernel", (8, 16), PartitionSpec()),  # a rule starts at a whole name
        ("image/projection/kernel/more", (8, 16), PartitionSpec()),
    ],
)
def test_spec_of_one_path(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    mesh = make_mesh(4, 2)
    assert partition_spec(path, shape, mesh) == spec
    assert partition_spec(f"optimizer/0/mu/clip/{path}", shape, mesh) == spec


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_moments_are_sharded_like_their_parameters(clip_norm: float) -> None:
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), 10)

    def state(key: jax.Array, clip: Any) -> TrainState:
        params = {"clip": clip, "heads": init_heads(key, TINY, 96, LossConfig())}
        return TrainState(jax.numpy.int32(0), params, optimizer.init(params))

    abstract = jax.eval_shape(state, jax.random.key(0), shapes("tiny"))
    shardings = tree_shardings(abstract, make_mesh(4, 2))
    params = by_path(shardings.params)
    assert any("fsdp" in sharding.spec for sharding in params.values())
    for moment in ("mu", "nu"):
        assert by_path(optax.tree.get(shardings.optimizer, moment)) == params
    assert shardings.step.spec == PartitionSpec()
