"""Each rule on both sides of its limit, the report as text and JSON, and a real run."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import ml_collections
import pytest

from tclip_jax.cli import main
from tclip_jax.planning.against import compare
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.measured import Measured, RecordedRun
from tclip_jax.planning.plan import Plan, make_plan
from tclip_jax.training import loop
from tests.planning.test_measured import H100, recorded, steps

GOOD = Measured(
    first=4, last=103, steps=100, seconds=3.0, typical=3.0, data=0.05, checkpoint=0.05, stalled=0.05, compiled=0.05,
    masked=0.01, skipped=0, compile_seconds=30.0, memory=1.1e9,
)  # fmt: skip


ON_H100 = RecordedRun("runs/a", ml_collections.ConfigDict(), H100, [])


@pytest.fixture
def plan(config: ml_collections.ConfigDict) -> Plan:
    """Takes 2 to 4 s, 1.5 GB; at peak rates 2 s of compute, 1 s of HBM and 0.5 s of network."""
    plan = make_plan(config, parse_topology("h100:8"))
    speed = plan.estimate.slow
    fast, slow = dataclasses.replace(speed, seconds=2.0), dataclasses.replace(speed, seconds=4.0)
    time = dataclasses.replace(plan.estimate, compute=2.0, memory=1.0, network=0.5, fast=fast, slow=slow)
    memory = dataclasses.replace(plan.facts.memory, temporaries=0)
    memory = dataclasses.replace(memory, temporaries=10**9 - memory.total)
    return dataclasses.replace(plan, estimate=time, facts=dataclasses.replace(plan.facts, memory=memory))


def rules(plan: Plan, **changes: Any) -> list[str]:
    return [each.rule for each in compare(ON_H100, dataclasses.replace(GOOD, **changes), plan)]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, "as planned"),
        ({"typical": 2.0}, "as planned"),
        ({"typical": 4.0}, "as planned"),
        ({"memory": None}, "as planned"),
        ({"data": 0.051}, "input-bound"),
        ({"data": 0.5, "typical": 9.0}, "input-bound"),  # which hides how fast the step is
        ({"compiled": 0.06}, "recompiling"),
        ({"stalled": 0.051}, "stalls"),
        ({"checkpoint": 0.051}, "checkpoints"),
        ({"masked": 0.011}, "padding"),
        ({"skipped": 1}, "skipped"),
        ({"memory": 1.11e9}, "memory"),
        ({"typical": 1.99}, "faster than possible"),
        ({"typical": 4.01}, "compute-bound"),
    ],
)
def test_rules_apply_above_their_limits(plan: Plan, changes: dict[str, Any], rule: str) -> None:
    assert rules(plan, **changes) == [rule]
    (finding,) = compare(ON_H100, dataclasses.replace(GOOD, **changes), plan)
    assert finding.falls_short == (rule != "as planned")


def test_what_bounds_a_slow_step(plan: Plan) -> None:
    def slow(**parts: float) -> str:
        changed = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, **parts))
        (finding,) = compare(ON_H100, dataclasses.replace(GOOD, typical=8.0), changed)
        return f"{finding.rule}: {finding.text}"

    assert slow().startswith("compute-bound: 8.0000 s a step are 2.00x the slow end; matrix products reach 25% of the")
    assert slow(memory=2.1).startswith("HBM-bound: 8.0000 s a step are 2.00x the slow end; HBM takes 46% of the plan")
    assert slow(network=1.01, memory=2.1).startswith("HBM-bound: ")
    assert slow(network=1.1).startswith(
        "communication-bound: 8.0000 s a step are 2.00x the slow end; collectives take 27%"
    )


def test_losses_come_first_and_all_are_named(plan: Plan) -> None:
    found = rules(plan, compiled=0.5, masked=0.5, typical=9.0, memory=3e9)
    assert found == ["recompiling", "padding", "compute-bound", "memory"]


def test_devices_without_figures_are_not_compared(plan: Plan) -> None:
    cpu = dataclasses.replace(ON_H100, devices=H100 | {"kind": "cpu"})
    slow = dataclasses.replace(GOOD, typical=9.0, memory=3e9)
    (finding,) = compare(cpu, slow, plan)
    assert finding == ("other devices", "speed and memory of 8 cpu are not compared with those of h100:8")
    assert not finding.falls_short
    assert [each.rule for each in compare(cpu, dataclasses.replace(slow, data=0.5), plan)] == [
        "input-bound",
        "other devices",
    ]
    unknown = dataclasses.replace(ON_H100, devices={})
    assert [each.rule for each in compare(unknown, slow, plan)] == ["compute-bound", "memory"]


def against(run: pathlib.Path, *options: str) -> int:
    return main(["plan", "--against", str(run), *options])


def test_the_report(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = make_plan(config, parse_topology("h100:8")).estimate
    seconds = (planned.fast.seconds + planned.slow.seconds) / 2
    run = recorded(tmp_path / "run", config, steps(33, **{"seconds/step": seconds, "memory_peak_bytes": 1e6}))
    assert against(run, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    measured, estimate = report["measured"], report["planned"]["estimate"]
    assert report["devices"] == H100 and report["planned"]["topology"] == "h100:8"
    assert measured["steps"] == 30 and measured["seconds"] == pytest.approx(seconds)
    # The same formulas as of the metrics.
    assert measured["images_per_second"] == pytest.approx(64 / seconds)
    flops = estimate["fast"]["mfu"] * estimate["fast"]["seconds"] * 989e12
    assert measured["mfu"] == pytest.approx(flops / 989e12 / seconds)
    assert [each["rule"] for each in report["findings"]] == ["as planned"]
    assert against(run, "--topology", "h100:8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run}: 30 steps, 4 to 33, on 8 NVIDIA H100 80GB HBM3; planned for h100:8, by formula")
    table = {line.split("  ")[0]: line.split() for line in lines[3:-2]}
    assert table["seconds per step"][-4] == f"{seconds:.4f}"
    assert table["GiB per device"][3] == "0.00" and table["compile and restore, s"][-1] == "40"
    assert lines[-1].startswith(f"as planned: {seconds:.4f} s a step are between ")
    waiting = steps(33, **{"seconds/step": seconds, "seconds/data": seconds})
    assert against(recorded(tmp_path / "waiting", config, waiting)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "input-bound: waits for data 50.0% of the time (more than 5%): measure the input alone with `tclip"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sweep", "remat=1"], "--against describes a run: leave out --sweep and --explain"),
        (["--explain"], "--against describes a run: leave out --sweep and --explain"),
        (["--config.remat=True"], "--config.KEY changes a recipe: it needs --config"),
        (["--topology", "h100:4"], "has run on 8 NVIDIA H100 80GB HBM3, h100:4 has 4 devices"),
        (["--config", "clip_kd"], "is a run of another configuration: "),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    words: str,
    config: ml_collections.ConfigDict,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = recorded(tmp_path / "run", config, steps(33))
    assert against(run, *options) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("tclip plan: error: ") and words in error


def test_a_plan_needs_a_configuration_or_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--config", "ternaryclip"], ["--topology", "h100:8"]):
        assert main(["plan", *options]) == 2
        assert "a plan needs --config and --topology, or --against with the workdir" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_run(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.update({"teacher": "", "remat": False, "dtype": "float32", "steps": 24})
    config.loss.crd, config.loss.positives, config.checkpoint.every = 0.0, "equal_text", 1000
    loop.train(config, tmp_path / "run")
    capsys.readouterr()
    assert against(tmp_path / "run") == 2
    assert "has run on 8 cpu, for which there are no figures: add --topology" in capsys.readouterr().err
    assert against(tmp_path / "run", "--topology", "h100:8", "--json") in (0, 1)  # stalls of a shared machine
    report = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "programs_compiled" in lines[0] and report["measured"]["steps"] == 21
    rates = [line["images_per_second"] for line in lines[3:]]
    assert report["measured"]["images_per_second"] == pytest.approx(21 / sum(1 / rate for rate in rates))
    assert report["findings"][-1]["rule"] == "other devices"
    assert report["measured"]["memory"] is None and report["devices"]["kind"] == "cpu"
    assert report["measured"]["compile_seconds"] == lines[0]["seconds/compile"]
