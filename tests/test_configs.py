"""Every shipped recipe, in every mode, is a run that its checks accept."""

from __future__ import annotations

import pytest

from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.plan import make_plan
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import run_config

ACCURACY = [
    f"accuracy:{data},{who}{plain}{mode}"
    for data in ("cifar10", "emoji")
    for who in (
        *("teacher", "full", "ternaryclip", "bitnet", "twn", "least_squares", "lsq", "seq", "group64", "gradual"),
        *("recovery", "hidden", "relations", "average", "patches"),
    )
    for plain in ("", ",plain")
    for mode in ("", ",runlocal")
]
PAPERS = [f"ternaryclip:{which}{mode}" for which in ("none", "Q-FFN", "Q-ALL") for mode in ("", ",8gpu", ",runlocal")]


@pytest.mark.parametrize("spec", [*ACCURACY, *PAPERS, "clip_kd", "clip_kd:runlocal"])
def test_recipe_is_a_run(spec: str) -> None:
    if ",plain" in spec and any(term in spec for term in ("hidden", "relations")):
        return  # these need a teacher, as the check of the configuration says
    run = run_config(override(load_recipe(spec), ["teacher=runs/teacher"] if "teacher" not in spec else []))
    assert run.steps == (4 if "runlocal" in spec else run.steps)
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


@pytest.mark.parametrize(
    "spec",
    ["ternaryclip:Q-SOME", "ternaryclip:Q-ALL,16gpu", "ternaryclip:Q-ALL,local", "clip_kd:x", "accuracy:mnist,full"],
)
def test_an_argument_that_no_recipe_has_is_named(spec: str) -> None:
    with pytest.raises(ValueError, match=f"{spec}: write"):
        load_recipe(spec)
