"""The facts of a step on GPUs by formula, against counts by hand."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
import ml_collections
import pytest

from tclip_jax.cli import main
from tclip_jax.models.clip import param_shapes
from tclip_jax.planning.estimate import StepFacts, formula_facts
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.runs.config import run_config

H100 = parse_topology("h100:8")


def elements(config: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(run_config(config).model)))


def sent(facts: StepFacts) -> dict[tuple[str, str, str], int]:
    return {(each.kind, each.name, each.dtype): each.bytes for each in facts.collectives}


def test_sharding_matches_training(config: ml_collections.ConfigDict) -> None:
    facts, count = formula_facts(run_config(config), H100), elements(config)
    # Q-ALL: attention, MLPs and token embedding.
    trits = 12 * 64 * 64 * (3 + 2) + 49408 * 64
    assert facts.mesh == {"data": 4, "fsdp": 2, "tensor": 1} and facts.how == "by formula"
    assert facts.memory.parameters == pytest.approx(4 * count / 2, rel=0.02)  # vectors and heads are replicated
    assert facts.memory.teacher == pytest.approx(2 * count / 2, rel=0.02)  # matrices are bfloat16
    assert facts.memory.batch == 8 * (32 * 32 * 3 + 4 * 32 + 4 + 4)  # weight and fault
    assert sent(facts) == {
        ("all-gather", "weights", "u8"): 3 * trits // 4,
        ("all-gather", "weights", "bf16"): 3 * 2 * (count - trits),
        ("all-gather", "the teacher's weights", "bf16"): 2 * count,
        ("reduce-scatter", "gradients", "f32"): 4 * count,
        ("all-reduce", "gradients", "f32"): 4 * (count // 2),
        ("all-gather", "embeddings", "f32"): 2 * 64 * 64 * 4,
        ("reduce-scatter", "gradients of embeddings", "f32"): 2 * 64 * 64 * 4,
    }
    assert StepFacts.from_json(facts.to_json()) == facts
    config.gradient_dtype = "bfloat16"
    matrices = 12 * 64 * 64 * (3 + 2)  # of the blocks
    gradients = {key: size for key, size in sent(formula_facts(run_config(config), H100)).items() if "gradients" in key}
    assert gradients == {
        ("reduce-scatter", "gradients", "f32"): 4 * (count - matrices),
        ("reduce-scatter", "gradients", "bf16"): 2 * matrices,
        ("all-reduce", "gradients", "f32"): 4 * ((count - matrices) // 2),
        ("all-reduce", "gradients", "bf16"): 2 * (matrices // 2),
    }


def test_remat_batch_size_and_fsdp_change_the_memory(config: ml_collections.ConfigDict) -> None:
    def temporaries(**changes: Any) -> int:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return formula_facts(run_config(changed), H100).memory.temporaries

    base = temporaries()
    assert temporaries(remat=False) > base
    assert temporaries(data__batch_size=128) > base
    assert temporaries(mesh__fsdp=1) > base  # gradients


def test_one_device_sends_nothing(config: ml_collections.ConfigDict) -> None:
    config.mesh.fsdp = 1
    assert formula_facts(run_config(config), parse_topology("h100:1")).collectives == ()


def test_tensor_parallel_devices_reduce_partial_sums(config: ml_collections.ConfigDict) -> None:
    config.mesh.tensor, config.ternary = 2, "none"  # half of a width of 64 is less than a group
    facts = formula_facts(run_config(config), H100)
    # 16 rows of the batch per pair of devices, after attention and the MLP of each layer, in three passes.
    assert facts.mesh["tensor"] == 2
    tensor = [each for each in facts.collectives if each.axes == ("tensor",)]
    assert sum(each.bytes for each in tensor) == 3 * 2 * (3 * 16 * 17 * 64 + 2 * 16 * 32 * 64) * 4


def test_a_mesh_that_does_not_fit(config: ml_collections.ConfigDict) -> None:
    config.mesh.fsdp = 3
    with pytest.raises(ValueError, match="fsdp=3, tensor=1 does not fit 8 devices"):
        formula_facts(run_config(config), H100)


def test_a_cache_that_is_not_there_has_the_width_of_the_preset(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = [f"--config.data.teacher_cache={tmp_path / 'store'}", "--config.teacher=", "--teacher-preset", "ViT-L-14"]
    assert main(["plan", "--config", "ternaryclip:Q-ALL", "--topology", "h100:8", *stored, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["plan", "--config", "ternaryclip:Q-ALL", "--topology", "h100:8", "--json"]) == 0
    with_teacher = json.loads(capsys.readouterr().out)
    assert plan["memory"]["teacher"] == 0 < with_teacher["memory"]["teacher"]
    assert plan["memory"]["batch"] == with_teacher["memory"]["batch"] + 128 * 2 * 768 * 2


@pytest.mark.parametrize(
    ("attention", "dtype", "reason"),
    [
        ("mosaic_tpu", "bfloat16", "it is for TPUs"),
        ("cudnn", "float32", "queries are bfloat16 or float16, not float32"),
    ],
)
def test_an_attention_that_gpus_do_not_have_is_refused(
    config: ml_collections.ConfigDict, attention: str, dtype: str, reason: str
) -> None:
    config.attention, config.dtype = attention, dtype
    with pytest.raises(ValueError, match=rf"config\.attention '{attention}' cannot run on h100:8: {reason}"):
        formula_facts(run_config(config), H100)


def test_fused_attention_has_no_logits_in_hbm(config: ml_collections.ConfigDict) -> None:
    fused = formula_facts(run_config(config), H100)
    config.attention = "reference"
    assert formula_facts(run_config(config), H100).traffic > fused.traffic
    config.attention, config.dtype = "cudnn", "bfloat16"
    assert formula_facts(run_config(config), H100).traffic == fused.traffic
