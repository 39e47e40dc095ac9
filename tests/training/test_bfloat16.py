"""Training in bfloat16 has gradients close to float32: all sums over rows, tokens and devices are in float32."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tclip_jax.inference.load import Architecture
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.planning.hlo import called, parse_program
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import LossConfig, run_config
from tclip_jax.ternary import Quantizer
from tclip_jax.training.build import Build
from tclip_jax.training.objective import Encoders, Objective, init_heads

HALF = (0.5, 0.5, 0.5)
LOSS = LossConfig(task=1.0, crd=1.0, icl=1.0, fd=2000.0)
ROOT = pathlib.Path(__file__).resolve().parents[2]


def assert_near(expected: Any, actual: Any) -> None:
    """Compares every parameter: norms agree within 1 %, the cosine is at least 0.999; scalars agree within 1 %.

    The keys' bias has no gradient, since a softmax ignores shifts: its computed gradient must be small.
    """
    ours, theirs = (flatten_dict(jax.device_get(tree), sep="/") for tree in (actual, expected))
    for path, y in theirs.items():
        x, y = np.float64(ours[path]), np.float64(y)
        if path.endswith("qkv/bias"):
            for key, value in zip(*(x.reshape(len(x), 3, -1)[:, i] for i in (1, 2)), strict=True):
                assert np.linalg.norm(key) <= 1e-2 * np.linalg.norm(value), path
            x, y = (np.delete(each.reshape(len(each), 3, -1), 1, axis=1) for each in (x, y))
        x, y = x.ravel(), y.ravel()
        norms = np.linalg.norm(y), np.linalg.norm(x)
        assert norms[1] == pytest.approx(norms[0], rel=1e-2), path
        assert x @ y >= (1 if y.size == 1 else 0.999) * norms[0] * norms[1] * (1 - 1e-9), path


@pytest.mark.slow
def test_25216_tokens_of_a_narrow_model() -> None:
    """The model also has LayerScale, pooling over tokens and a small embedding; the embeddings' gradient is fixed."""
    vision = VisionConfig((3, 5), patch_size=1, width=16, layers=1, head_width=8, ls_init_value=0.5, pool_type="avg")
    text = TextConfig(context_length=16, vocab_size=24, width=16, heads=2, layers=1, ls_init_value=0.5)
    config, rules = CLIPConfig(8, vision, text), ternary_rules("Q-FFN", Quantizer(group=8))
    rng, rows = np.random.default_rng(0), 1576
    images = rng.standard_normal((rows, 3, 5, 3)).astype(np.float32)
    tokens = rng.integers(0, 24, (rows, 16))
    # The rows share a small mean, as in the gradient of a loss.
    to_image, to_text = (rng.standard_normal((rows, 8)) + rng.standard_normal(8) / 4 for _ in range(2))

    def total(params: Any, dtype: Any) -> jax.Array:
        image, text, _ = CLIP(config, rules, dtype).apply({"params": params}, images, tokens)
        return jnp.sum(image * to_image.astype(np.float32)) + jnp.sum(text * to_text.astype(np.float32))

    params = init_params(CLIP(config, rules), jax.random.key(0))
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    expected, actual = gradient(params, jnp.float32), gradient(params, jnp.bfloat16)
    for gradients in (expected, actual):
        assert gradients.pop("logit_scale") == 0
    assert_near(expected, actual)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "grid"), [(128, (14, 14)), (3152, (1, 31))], ids=["25216", "100864"])
@pytest.mark.parametrize("which", ["none", "Q-ALL"])
def test_the_recipes_gradients(which: str, rows: int, grid: tuple[int, int]) -> None:
    """Width 64, two layers, the recipe's losses and a teacher: rows x (1 + patches) image tokens."""
    rules = ternary_rules(which, Quantizer(group=64))
    vision = VisionConfig((4 * grid[0], 4 * grid[1]), patch_size=4, width=64, layers=2, head_width=32)
    config = CLIPConfig(32, vision, TextConfig(context_length=8, vocab_size=512, width=64, heads=2, layers=2))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (rows, *vision.image_size, 3), np.uint8),
        "tokens": np.concatenate([rng.integers(1, 511, (rows, 7)), np.full((rows, 1), 511)], axis=1).astype(np.int32),
        "weight": np.ones(rows, np.float32),
    }
    params = {"clip": init_params(CLIP(config, rules), jax.random.key(0))}
    params["heads"] = init_heads(jax.random.key(1), config, config, LOSS)
    teacher = init_params(CLIP(config), jax.random.key(7))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params: Any, dtype: Any) -> Any:
        student = Encoders(CLIP(config, rules, dtype, remat=True), HALF, HALF)
        objective = Objective(student, Encoders(CLIP(config), HALF, HALF), LOSS)

        def loss(params: Any) -> jax.Array:
            return objective.loss(params, teacher, batch, *objective.encode(params, teacher, batch, batch))[0]

        return jax.grad(loss)(params)

    assert_near(gradient(params, jnp.float32), gradient(params, jnp.bfloat16))


def recipe(which: str, changes: dict[str, Any]) -> ml_collections.ConfigDict:
    """Returns the TernaryCLIP recipe with bfloat16 and remat, for two layers of width 64."""
    config = load_recipe(f"ternaryclip:{which}")
    config.model.embed_dim = 32
    config.model.vision_cfg.update({"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32})
    config.model.text_cfg.update({"context_length": 16, "width": 64, "layers": 2, "heads": 2})
    config.data.batch_size = 32
    config.mesh.fsdp = 2
    config.quantizer.group = 32
    for name, value in changes.items():
        override(config, [f"{name}={value!r}"])
    return config


def operations(block_or_module: Any) -> Iterator[Any]:
    """Yields all operations of a StableHLO module, those of regions after the enclosing operation."""
    for region in block_or_module.operation.regions:
        for block in region:
            for each in block:
                yield each.operation
                yield from operations(each)


def is_narrow(value: Any) -> bool:
    return bool(re.search(r"x?b?f16>", str(value.type)))


def narrow_sums(module: Any) -> list[str]:
    """Returns the sums in half precision: reductions, dense products, and loop carries that are not activations.

    Products with batching axes belong to attention, within a sample, and are not counted.
    """
    sums = []
    for each in operations(module):
        kind = each.name.removeprefix("stablehlo.")
        names = [op.name for op in operations(each)] if len(each.regions) else []
        if kind in ("reduce", "all_reduce", "reduce_scatter", "scatter", "reduce_window", "select_and_scatter"):
            if "stablehlo.add" in names and any(map(is_narrow, each.results)):
                sums.append(f"{kind} {each.results[0].type}")
        elif kind == "dot_general" and is_narrow(each.results[0]):
            if "batching_dim" not in str(each.attributes["dot_dimension_numbers"]):
                sums.append(f"{kind} {each.results[0].type}")
        elif kind == "while":
            body = each.regions[1].blocks[0]
            carried = dict(zip(list(body)[-1].operands, body.arguments, strict=True))
            for new, old in carried.items():
                adds = (
                    is_narrow(new) and getattr(new.owner, "name", "") == "stablehlo.add" and old in new.owner.operands
                )
                if adds and new.type.rank < 3:
                    sums.append(f"{kind} {new.type}")
    return sums


STATES = {"loss.hidden": 1.0, "loss.relations": 1.0, "loss.relation_heads": 2}
OTHERS = {"loss.affinity": 1.0, "loss.open_clip": 1.0, "loss.kl": 1.0, "loss.distributed": "ring"}
AVERAGED = {"data.microbatches": 2, "optimizer.ema_decay": 0.9, "optimizer.clip_norm": 1.0, "ternary_warmup_steps": 5}


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("Q-ALL", {}),
        ("none", {"remat": False, **OTHERS}),
        ("Q-FFN", {"loss.task_kind": "sigmoid", **AVERAGED}),
        ("Q-ALL", {"quantizer.kind": "lsq", "mesh.tensor": 2, **STATES}),
        ("Q-ALL", {"quantizer.kind": "seq", "quantizer.group": "channel", "remat": False, "data.microbatches": 2}),
    ],
    ids=["recipe", "float, ring", "microbatches", "tensor, states, lsq", "seq"],
)
def test_no_sum_of_the_step_is_in_bfloat16(which: str, changes: dict[str, Any]) -> None:
    run = run_config(recipe(which, changes))
    build = Build(run, make_mesh(-1, run.mesh.fsdp, run.mesh.tensor), Architecture(run.model, run.preprocess))
    with jax.set_mesh(build.mesh):
        shapes = build.state_shapes, build.batch_shapes, build.teacher_shapes
        traced = build.jitted_step(shapes[0]).trace(*shapes)
        for platform in ("tpu", "cpu"):
            assert narrow_sums(traced.lower(lowering_platforms=(platform,)).compiler_ir("stablehlo")) == []


def test_sums_in_bfloat16_are_detected() -> None:
    """One example of each sum that the tests above must detect."""
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 3), jnp.bfloat16)

    def step(x: jax.Array, w: jax.Array, index: jax.Array) -> Any:
        bias = jax.vjp(lambda b: x + b, x[0])[1](x)
        rows = jnp.zeros_like(x).at[index].add(x)
        return bias, rows, x @ w, jax.lax.fori_loop(0, index[0], lambda i, total: total + x[i], x[0])

    module = jax.jit(step).lower(x, w, jnp.arange(4)).compiler_ir("stablehlo")
    assert {each.split()[0] for each in narrow_sums(module)} == {"reduce", "scatter", "dot_general", "while"}


_COMPILE = """
import json, pathlib, sys
import jax, ml_collections
from jax.experimental import topologies
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.inference.load import Architecture
from tclip_jax.training.build import Build
from tclip_jax.runs.config import run_config

run = run_config(ml_collections.ConfigDict(json.load(sys.stdin)))
described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = make_mesh(-1, run.mesh.fsdp, run.mesh.tensor, devices=described.devices)
build = Build(run, mesh, Architecture(run.model, run.preprocess))
with jax.set_mesh(mesh):
    shapes = build.state_shapes, build.batch_shapes, build.teacher_shapes
    compiled = build.jitted_step(shapes[0]).lower(*shapes).compile()
pathlib.Path(sys.argv[1]).write_text(compiled.as_text())
"""


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "changes",
    [{}, {"mesh.tensor": 2, "data.microbatches": 2}, {"gradient_dtype": "bfloat16"}],
    ids=["recipe", "tensor", "gradients"],
)
def test_the_step_that_is_compiled_for_a_tpu_sums_in_bfloat16_only_gradients_that_ask_for_it(
    tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    """The compiled program also has the sums between devices, which the partitioner adds."""
    command = [sys.executable, "-c", _COMPILE, str(tmp_path / "program")]
    config = json.dumps(recipe("Q-ALL", changes).to_dict())
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    process = subprocess.run(command, cwd=ROOT, input=config, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    program = parse_program((tmp_path / "program").read_text())
    reductions = []
    for computation in program.computations.values():
        for each in computation.values():
            kind = each.opcode.removesuffix("-start")
            if kind not in ("reduce", "all-reduce", "reduce-scatter", "scatter", "reduce-window"):
                continue
            if computation[each.operands[0]].opcode == "dynamic-update-slice":
                continue  # parts padded with zeros: a gather, not a sum
            if "add" in {op.opcode for name in called(each) for op in program.computations[name].values()}:
                # XLA removes axes of size 1 with a reduction, which is not a sum.
                adds = any(array.size != computation[each.operands[0]].arrays[0].size for array in each.arrays)
                reductions.append((kind, {array.dtype for array in each.arrays}, kind != "reduce" or adds))
    kinds = {kind for kind, *_ in reductions}
    assert {"reduce", "all-reduce", "scatter"} <= kinds  # the program has these sums, and they were read
    narrow = [kind for kind, dtypes, adds in reductions if dtypes & {"bf16", "f16"} and adds]
    assert {*narrow} == ({"all-reduce"} if "gradient_dtype" in changes else set())
