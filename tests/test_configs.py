"""Every shipped recipe, in every mode, is a run that its checks accept."""

from __future__ import annotations

import re

import pytest

from configs.accuracy import METHODS, TERNARY_METHODS, full_precision_of, plain_of, steps_of
from tclip_jax.artifacts.pack import flatten
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.ternary_rules import TERNARIZABLE, find_quantizer
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.plan import make_plan
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import run_config

ACCURACY = [
    f"accuracy:{data},{who}{plain}{mode}"
    for data in ("cifar10", "emoji")
    for who in (
        *(
            "teacher",
            "full",
            "ternaryclip",
            "bitnet",
            "twn",
            "least_squares",
            "lsq",
            "seq",
            "sherry",
            "int8",
            "int4+added",
            "group64",
            "patches",
        ),
        *(f"ternaryclip+{method}" for method in METHODS | TERNARY_METHODS),
        *("full+x4", "ternaryclip+soft+dead_zone+clipped+embedding4+x3.5", "full+added+relational"),
        *("ternaryclip+edges8+w96", "int8+edges8+x4"),
    )
    for plain in ("", ",plain")
    for mode in ("", ",siglip", ",siglip,runlocal", ",runlocal")
]
PAPERS = [f"ternaryclip:{which}{mode}" for which in ("none", "Q-FFN", "Q-ALL") for mode in ("", ",8gpu", ",runlocal")]


@pytest.mark.parametrize("spec", [*ACCURACY, *PAPERS, "clip_kd", "clip_kd:runlocal"])
def test_recipe_is_a_run(spec: str) -> None:
    if ",plain" in spec and any(term in spec for term in ("hidden", "relation")):
        return  # these need a teacher, as the check of the configuration says
    run = run_config(override(load_recipe(spec), [] if ",teacher" in spec else ["teacher=runs/teacher"]))
    if "runlocal" in spec:
        assert run.steps == (5 if "longer" in spec else 6 if "longest" in spec else 4)
    assert bool(run.rules) != any(name in spec for name in (",full", ",teacher", "ternaryclip:none", "clip_kd"))
    if "runlocal" not in spec and "accuracy" not in spec:
        assert run.model.vision.width == 768 and run.teacher and run.loss.weights["fd"] == 2000


def test_the_recipe_for_8_gpus_is_the_same_run_and_fits_80_gb() -> None:
    """It changes only how a step is computed; by plan, it would fit if the formulas were a factor of 4 too low."""
    pod, node = load_recipe("ternaryclip:Q-ALL"), load_recipe("ternaryclip:Q-ALL,8gpu")
    assert {key for key in pod if pod[key] != node[key]} == {"remat"}
    for gpus in ("a100:8", "h100:8"):
        plan = make_plan(node, parse_topology(gpus))
        assert plan.device_memory == 80e9 and 4 * plan.facts.memory.total < plan.device_memory
        assert plan.estimate.slow.hours < make_plan(pod, parse_topology(gpus)).estimate.slow.hours


def test_a_variant_is_a_quantizer_and_methods() -> None:
    plain, run = load_recipe("accuracy:cifar10,full"), load_recipe("accuracy:cifar10,sherry+x2.5+decayed+added")
    assert (run.quantizer.kind, run.ternary) == ("sherry", "Q-ALL")
    ((pattern, group),) = run.optimizer.groups
    assert group == {"learning_rate": 2.5, "weight_decay": 0.3} and "token_embedding" in pattern
    assert run.steps - run.optimizer.recovery_steps == plain.steps and run.optimizer.recovery_steps == 200
    assert full_precision_of("sherry+soft+edges8+x2.5+w96+added") == "full+x2.5+w96+added"
    assert plain_of("ternaryclip+clipped+muon+x16") == "ternaryclip+muon+x16"
    assert plain_of("ternaryclip+x4+int8_teacher") == "ternaryclip+x4+in_step"
    assert plain_of("sherry+soft+edges8+x2.5+w96+added") == "ternaryclip+x2.5+w96" and plain_of("full+added") == "full"
    assert [steps_of(f"full{each}", 1000) for each in ("", "+added", "+longer+pretrained")] == [1000, 1100, 2500]
    for variant, reason in (
        ("ternary+x2", "'ternary' is no quantizer"),
        ("int4+soft", "'soft' is no method of int4"),
        ("full+added+longer", "added and longer both set steps: leave one of them out"),
        ("full+edges8", "'edges8' is no method of full"),
        ("full+w32+w64", "w32 and w64 both set width"),
        ("full+x2+x4", "x2 and x4 both set latent.learning_rate"),
        ("full+undecayed+x2+decayed", "undecayed and decayed both set latent.weight_decay"),
        ("patches+embedding4", "patches and embedding4 both set ternary"),
        ("full+inherit+pretrained", "inherit and pretrained both set init"),
    ):
        with pytest.raises(ValueError, match=rf"accuracy:emoji,{variant.replace('+', '.')}: write .*{reason}"):
            load_recipe(f"accuracy:emoji,{variant}")


@pytest.mark.parametrize("mode", ["", ",siglip"])
@pytest.mark.parametrize("quantizer", ["ternaryclip", "patches", "int4"])
def test_a_rate_of_the_matrices_is_that_of_all_that_are_quantized(quantizer: str, mode: str) -> None:
    run = run_config(load_recipe(f"accuracy:cifar10,{quantizer}+x2,plain{mode}"))
    ((pattern, _),) = run.optimizer.groups
    kernels = {path for path in flatten(param_shapes(run.model, ())) if path in TERNARIZABLE}
    quantized = {path for path in kernels if find_quantizer(path, run.rules)}
    assert quantized == {path for path in kernels if re.fullmatch(pattern, f"clip/{path}")}
    assert ("image/pool/mlp/fc1/kernel" in quantized) == bool(mode)


@pytest.mark.parametrize(
    "spec",
    ["ternaryclip:Q-SOME", "ternaryclip:Q-ALL,16gpu", "ternaryclip:Q-ALL,local", "clip_kd:x", "accuracy:mnist,full"],
)
def test_an_argument_that_no_recipe_has_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=f"{spec}: write"):
        load_recipe(spec)
