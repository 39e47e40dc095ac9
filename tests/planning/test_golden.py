"""The compiled step of the paper's recipe: what it moves and holds on v5e:4x4, and that it compiles for every chip."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from typing import Any

import pytest

from tclip_jax.cli import main

GOLDEN = pathlib.Path(__file__).with_name("golden_v5e_4x4.json")
RECIPE = ["plan", "--config", "ternaryclip:Q-ALL", "--json", "--explain"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*RECIPE, *arguments]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["at_peak"]["total"] == pytest.approx(plan["peak"], rel=1e-4)  # the arrays explain the compiler's peak
    return plan


def measured(plan: dict[str, Any]) -> dict[str, float]:
    """Bytes of HBM traffic, of the peak, and of the collectives of each kind and axes."""
    values = {"traffic": plan["traffic"], "peak": plan["peak"], "kernel_flops": plan["kernel_flops"]}
    for each in plan["collectives"]:
        name = f"{each['kind']} {'+'.join(each['axes'])} {each['dtype']}"
        values[name] = values.get(name, 0) + each["bytes"]
    return {name: value for name, value in values.items() if value > 1e6}


@pytest.mark.tpu_compile
def test_the_step_moves_what_it_moved(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    """If a change of the code is meant to change these figures, write `measured` of the new plan to the file."""
    plan = planned(
        capsys,
        *("--topology", "v5e:4x4", "--config.data.batch_size=2048", "--config.mesh.fsdp=4", "--cache", str(tmp_path)),
    )
    golden, actual = json.loads(GOLDEN.read_text()), measured(plan)
    (tmp_path / "measured.json").write_text(json.dumps(actual, indent=2))
    assert plan["moving_activations"] == []
    assert {choice[0] for choice in plan["attention"].values()} == {"mosaic_tpu"}
    changes = {name: (golden["values"].get(name, 0), actual.get(name, 0)) for name in {*golden["values"], *actual}}
    changes = {name: pair for name, pair in changes.items() if pair[1] != pytest.approx(pair[0], rel=0.03)}
    if changes and (version := importlib.metadata.version("libtpu")) != golden["libtpu"]:
        pytest.skip(f"libtpu {version}, not {golden['libtpu']}, changes (before, now): {changes}")
    assert not changes


@pytest.mark.tpu_compile
@pytest.mark.parametrize("distributed", ["gather", "ring"])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_recipe_compiles_for_the_smallest_slice(
    topology: str, distributed: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    plan = planned(
        capsys,
        *("--topology", topology, "--config.data.batch_size=512", "--config.mesh.fsdp=2", "--cache", str(tmp_path)),
        f"--config.loss.distributed={distributed}",
    )
    assert plan["fits"] and plan["moving_activations"] == []
    assert {choice[0] for choice in plan["attention"].values()} == {"mosaic_tpu"}
    # XLA writes some other collectives of two devices as permutations, too.
    assert any("/ppermute" in each["name"] for each in plan["collectives"]) == (distributed == "ring")
    # Each chip gathers the matrices of the teacher in bfloat16, 0.8 GB.
    assert measured(plan)["all-gather fsdp bf16"] == pytest.approx(0.861e9, rel=0.03)
