"""The sharding of every parameter against golden files: with a misspelt rule it would silently be replicated.

golden/ holds the PartitionSpec of every parameter of every preset on two meshes. After an intended change, rewrite the
files and review the diff:

    TCLIP_UPDATE_GOLDEN=1 pytest tests/parallel/test_sharding.py
"""

from __future__ import annotations

import dataclasses
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
from tclip_jax.parallel.mesh import abstract_mesh, make_mesh
from tclip_jax.parallel.sharding import RULES, partition_spec, path_of, tree_shardings
from tclip_jax.runs.config import LossConfig, OptimizerConfig
from tclip_jax.training.objective import init_heads
from tclip_jax.training.optimizer import make_optimizer
from tclip_jax.training.state import TrainState

TINY = CLIPConfig.from_open_clip(model_cfg("tiny"))
SIGLIP = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, pool_type="map", class_token=False, patch_bias=True, no_ln_pre=True),
)
GOLDEN = pathlib.Path(__file__).with_name("golden")
MESHES = {"data4-fsdp2": (4, 2, 1), "data2-fsdp2-tensor2": (2, 2, 2)}


@functools.cache
def shapes(preset: str) -> dict[str, Any]:
    return param_shapes(CLIPConfig.from_open_clip(model_cfg(preset)))


def by_path(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def specs(preset: str, mesh: str = "data4-fsdp2") -> dict[str, Any]:
    shardings = by_path(tree_shardings(shapes(preset), make_mesh(*MESHES[mesh])))
    return {path: json.loads(json.dumps(tuple(sharding.spec))) for path, sharding in shardings.items()}


def write_golden(mesh: str) -> None:
    presets = []
    for preset in PRESETS:
        lines = ",\n".join(f"    {json.dumps(path)}: {json.dumps(spec)}" for path, spec in specs(preset, mesh).items())
        presets.append(f"  {json.dumps(preset)}: {{\n{lines}\n  }}")
    (GOLDEN / f"{mesh}.json").write_text("{\n" + ",\n".join(presets) + "\n}\n")


if os.environ.get("TCLIP_UPDATE_GOLDEN"):
    for name in MESHES:
        write_golden(name)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("preset", PRESETS)
def test_shardings_equal_the_golden_files(preset: str, mesh: str) -> None:
    assert specs(preset, mesh) == json.loads((GOLDEN / f"{mesh}.json").read_text())[preset]


@pytest.mark.parametrize("sizes", [(1, 8), (1, 4, 2), (1, 2, 4)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_device_holds_its_share_of_the_weights(preset: str, sizes: tuple[int, ...]) -> None:
    mesh = make_mesh(*sizes)
    held = sum(
        np.prod(NamedSharding(mesh, partition_spec(path, leaf.shape, mesh)).shard_shape(leaf.shape))
        for path, leaf in by_path(shapes(preset)).items()
    )
    assert 1 / 8 <= held / sum(leaf.size for leaf in jax.tree.leaves(shapes(preset))) < 1 / 8 + 0.01


@pytest.mark.parametrize("pattern", [pattern for pattern, *_ in RULES])
def test_every_rule_applies_to_some_parameter(pattern: str) -> None:
    heads = jax.eval_shape(lambda key: init_heads(key, TINY, 96, LossConfig(icl=1.0)), jax.random.key(0))
    trees = {"clip": shapes("tiny"), "siglip": param_shapes(SIGLIP), "heads": heads}
    first = [next(p for p, *_ in RULES if re.search(rf"(?:^|/){p}$", path)) for path in by_path(trees)]
    assert pattern in first


def test_attention_pooling_is_sharded_as_the_blocks_are() -> None:
    mesh = make_mesh(2, 2, 2)
    shardings = by_path(tree_shardings(param_shapes(SIGLIP), mesh))
    for name in ("attention/out", "mlp/fc1", "mlp/fc2"):
        in_block, in_pool = (shardings[f"image/{place}/{name}/kernel"].spec for place in ("blocks", "pool"))
        assert tuple(in_block[1:]) == tuple(in_pool), name
    for name in ("q", "kv"):
        assert tuple(shardings[f"image/pool/attention/{name}/kernel"].spec) == (None, ("tensor", "fsdp"))


def test_a_shard_never_splits_a_group_of_weights() -> None:
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
        ("image/myprojection/kernel", (8, 16), PartitionSpec()),  # a rule matches whole names
        ("image/projection/kernel/more", (8, 16), PartitionSpec()),
    ],
)
def test_spec_of_one_path(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    mesh = make_mesh(4, 2)
    assert partition_spec(path, shape, mesh) == spec
    assert partition_spec(f"optimizer/0/mu/clip/{path}", shape, mesh) == spec


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("text/blocks/attention/qkv/kernel", (2, 8, 24), PartitionSpec(None, None, ("tensor", "fsdp"))),
        ("text/blocks/attention/qkv/kernel", (2, 8, 22), PartitionSpec(None, None, "fsdp")),  # 4 does not divide 22
        ("text/blocks/attention/out/kernel", (2, 8, 8), PartitionSpec(None, "tensor", "fsdp")),
        ("text/blocks/mlp/fc2/kernel_scale", (2, 4, 8), PartitionSpec(None, "tensor", "fsdp")),
        ("text/blocks/mlp/fc2/kernel_scale", (2, 1, 8), PartitionSpec(None, None, "fsdp")),
        ("text/token_embedding/embedding", (49408, 8), PartitionSpec(("tensor", "fsdp"), None)),
        ("heads/hidden/image/kernel", (8, 16), PartitionSpec(None, ("tensor", "fsdp"))),
    ],
)
def test_spec_of_one_path_over_tensor(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> None:
    assert partition_spec(path, shape, abstract_mesh(8, 2, 2, 2)) == spec
    assert partition_spec(f"optimizer/0/mu/clip/{path}", shape, make_mesh(2, 2, 2)) == spec


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_moments_are_sharded_like_their_parameters(clip_norm: float) -> None:
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), 10)

    def state(key: jax.Array, clip: Any) -> TrainState:
        params = {"clip": clip, "heads": init_heads(key, TINY, 96, LossConfig(icl=1.0))}
        return TrainState(jax.numpy.int32(0), params, optimizer.init(params))

    abstract = jax.eval_shape(state, jax.random.key(0), shapes("tiny"))
    shardings = tree_shardings(abstract, make_mesh(4, 2))
    params = by_path(shardings.params)
    assert any("fsdp" in sharding.spec for sharding in params.values())
    for moment in ("mu", "nu"):
        assert by_path(optax.tree.get(shardings.optimizer, moment)) == params
    assert shardings.step.spec == PartitionSpec()
