"""Plans as text and JSON, sweeps, the cache of compiled plans, and error messages."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import ml_collections
import pytest

from tclip_jax.cli import main
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.planning import child
from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.estimate import StepFacts, formula_facts
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.plan import Plan, make_plan, plan_text
from tclip_jax.planning.sweep import Point, best, parse_grid
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import run_config

RECIPE = ["plan", "--config", "ternaryclip:Q-ALL", "--topology"]
H100 = parse_topology("h100:8")


def changed(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, **changes))


def test_a_plan_states_whether_it_fits(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    assert plan.fits and f"fits: 0% of {80e9 / 2**30:.1f} GiB" in plan_text(plan)
    large = changed(plan, memory=dataclasses.replace(plan.facts.memory, temporaries=10**11))
    assert not large.fits and "does NOT fit: 125% of 74.5 GiB" in plan_text(large)
    assert large.to_json()["fits"] is False and large.to_json()["memory"]["total"] > 10**11
    text = plan_text(make_plan(config, H100, price=1e12))
    assert "8 chips, mesh data=4, fsdp=2, tensor=1; batch 64, 8 per device; by formula" in text
    assert "1,000 steps: " in text and "a cost of" in text


def test_weights_gathered_as_trits(config: ml_collections.ConfigDict) -> None:
    assert make_plan(config, H100).quantized_gather
    config.ternary = "none"
    plan = make_plan(config, H100)
    assert plan.quantized_gather is None and "as trits" not in plan_text(plan)
    trits = (Array("u8", (64, 16)), Array("bf16", (1, 64)))
    gather = Collective("all-gather", trits, ("fsdp",), 2, 3, "")
    plan = changed(plan, collectives=(gather,))
    assert plan.quantized_gather == (3 * (1024 + 128), 3 * 64 * 64 * 2)
    assert "weights gathered as trits: 0.0 MiB, 0.14 of their size in bfloat16" in plan_text(plan)


def test_collectives_that_carry_activations_are_named(config: ml_collections.ConfigDict) -> None:
    plan = changed(make_plan(config, H100), how="compiled")
    assert "no collective carries a batch x sequence x width array" in plan_text(plan)
    moved = changed(plan, moving_activations=("all-gather bf16[64,17,64] blocks/mlp",))
    assert "1 collectives carry batch x sequence x width arrays:\n  all-gather bf16[64,17,64]" in plan_text(moved)


def test_a_sweep_of_gpus(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    sweep = ["--sweep", "batch_size=32768", "mesh.fsdp=1,3", "remat=True,False", "--out", str(out)]
    assert main([*RECIPE, "h100:64", *sweep]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split()[:4] == ["batch_size", "fsdp", "remat", "GiB"]
    assert "batch_size=32768, fsdp=3, remat=True: mesh data=-1, fsdp=3, tensor=1 does not fit 64 devices" in text
    assert "best that fits: batch_size=32768, fsdp=1, remat=False" in text
    points = json.loads((out / "sweep.json").read_text())
    assert len(points) == 4 and sum(point["plan"] is None for point in points) == 2
    assert (out / "sweep.html").read_text().count("<img") == 1
    # Remat needs more time and less memory.
    stored, recomputed = points[1]["plan"], points[0]["plan"]
    assert stored["estimate"]["serial"] < recomputed["estimate"]["serial"]
    assert stored["memory"]["total"] > recomputed["memory"]["total"]


def test_the_best_is_the_fastest_that_fits(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    slow = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, serial=9.0))
    large = changed(plan, memory=dataclasses.replace(plan.facts.memory, temporaries=10**11))
    points = [Point({"a": "1"}, slow), Point({"a": "2"}, large), Point({"a": "3"}, plan), Point({"a": "4"}, None, "no")]
    assert best(points) is points[2] and best(points[1:2]) is None


def test_grids() -> None:
    assert parse_grid(["batch_size=1,2", "remat=True"]) == [
        {"data.batch_size": "1", "remat": "True"},
        {"data.batch_size": "2", "remat": "True"},
    ]
    with pytest.raises(ValueError, match="'remat' has no values"):
        parse_grid(["remat"])


def test_compiled_plans_are_cached_until_their_key_changes(
    config: ml_collections.ConfigDict,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests: list[Any] = []

    def compile_request(request: Any) -> StepFacts:
        requests.append(request)
        return formula_facts(run_config(config), H100)

    monkeypatch.setattr(child, "_compile", compile_request)
    v5e = parse_topology("v5e:2x4")
    first = make_plan(config, v5e, cache=tmp_path / "cache")
    again = make_plan(config, v5e, cache=tmp_path / "cache", price=2.0)
    assert len(requests) == 1 and again.facts == first.facts and again.estimate.cost
    make_plan(config, v5e, cache=tmp_path / "cache", teacher_preset="tiny")
    make_plan(config, v5e)
    assert len(requests) == 3 and len(list((tmp_path / "cache").iterdir())) == 2
    for text in ("", '{"hbm', "{}", "[]"):  # truncated or foreign files
        for path in (tmp_path / "cache").iterdir():
            path.write_text(text)
        assert make_plan(config, v5e, cache=tmp_path / "cache").facts == first.facts
    assert len(requests) == 7 and caplog.text.count("is not a valid cached plan") == 4


def test_the_key_of_a_cached_plan_has_all_its_inputs(
    config: ml_collections.ConfigDict,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests: list[Any] = []
    monkeypatch.setattr(
        child, "_compile", lambda request: requests.append(request) or formula_facts(run_config(config), H100)
    )
    v5e, teacher, package = parse_topology("v5e:2x4"), tmp_path / "teacher", tmp_path / "package"
    teacher.mkdir()
    package.mkdir()
    (package / "code.py").write_text("one")
    monkeypatch.setattr(child, "_PACKAGE", package)
    (teacher / "config.json").write_text(config.to_json())
    config.teacher = str(teacher)

    def compiled() -> int:
        before = len(requests)
        make_plan(config, v5e, cache=tmp_path / "cache")
        return len(requests) - before

    assert [compiled(), compiled()] == [1, 0]
    (path,) = (tmp_path / "cache").iterdir()
    for name, value in (
        ("LIBTPU_INIT_ARGS", "--xla_tpu_x=1"),
        ("XLA_FLAGS", "--xla_y=2"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
        ("TCLIP_IMPLEMENTATION", "reference"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert [compiled(), compiled()] == [1, 0], name
    assert compiled() == 0
    (package / "code.py").write_text("two")
    assert [compiled(), compiled()] == [1, 0]
    deeper = ml_collections.ConfigDict(json.loads(config.to_json()))
    deeper.model.vision_cfg.layers += 1
    (teacher / "config.json").write_text(deeper.to_json())
    assert [compiled(), compiled()] == [1, 0], "another model at the teacher's path"
    monkeypatch.setattr(child, "_version", lambda name: "0" if name == "libtpu" else "1")
    assert [compiled(), compiled()] == [1, 0]
    newest = max((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for content, message in (
        (path.read_text(), "teacher: "),
        ('{"made_by"', "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"made_by": json.loads(newest.read_text())["made_by"], "facts": {}}), "KeyError: 'memory'"),
    ):
        newest.write_text(content)
        assert [compiled(), compiled()] == [1, 0]
        assert f"{newest} is not a valid cached plan (" in caplog.messages[-1] and message in caplog.messages[-1]


def test_the_architecture_of_a_teacher_needs_no_weights(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def width(teacher: str, preset: str = "") -> int:
        config.teacher = teacher
        teacher_shape: Any = find_teacher(run_config(config), preset)
        return teacher_shape.config.vision.width

    assert width("tiny") == 64
    assert width("hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K") == width("runs/none", "ViT-L-14") == 1024
    (tmp_path / "config.json").write_text(config.to_json())
    assert width(str(tmp_path)) == 64
    assert CLIPConfig.from_open_clip(model_cfg("ViT-L-14")).vision.layers == 24
    with pytest.raises(ValueError, match=r"the architecture of the teacher 'hf-hub:a/b' is unknown.*--teacher-preset"):
        width("hf-hub:a/b")
    config.teacher, config.data.teacher_cache = "", str(tmp_path / "store")
    cached = find_teacher(run_config(config), "ViT-L-14")
    assert isinstance(cached, TeacherCache) and cached.embed_dim == 768
    config.loss.crd, config.data.teacher_cache = 0.0, ""
    assert find_teacher(run_config(config)) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["h100:63"], "global batch 1024 is not divisible by 63 devices"),
        (["v5e:3x3"], "there is no topology 'v5e:3x3': choose from v5e, v6e: 1x1"),
        (["h100:64", "--config.teacher=runs/none"], "add --teacher-preset"),
        (["h100:64", "--teacher-preset", "ViT-L"], "the nearest is 'ViT-L-14'"),
        (["h100:64", "--sweep", "batch=1,2"], "config has no 'batch'"),
        (["h100:64", "--sweep", "mesh.fsdp=3"], "no point of the sweep can be planned; fsdp=3: "),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tclip plan: error: ") and words in error and error.count("\n") == 1


def test_a_machine_without_libtpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    assert main([*RECIPE, "v5e:2x2", "--cache", ""]) == 2
    assert "libtpu, the compiler for TPUs, is not installed: pip install 'tclip-jax[plan]'" in capsys.readouterr().err


@pytest.mark.tpu_compile
def test_the_command_on_a_small_topology(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--config.model.embed_dim=64", "--config.dtype=bfloat16", "--config.teacher=tiny", "--config.mesh.fsdp=2"]
    text = ["--config.model.text_cfg.context_length=32", "--config.data.batch_size=64"]
    command = ["plan", "--config", "ternaryclip:Q-ALL,runlocal", "--topology", "v5e:2x2", *tiny, *text]
    command += ["--cache", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["how"] == "compiled" and plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and plan["fits"]
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["parameters"], rel=1e-3)
    assert plan["links"] and all(each["axes"] for each in plan["collectives"])
    assert {each["times"] for each in plan["collectives"]} >= {1, 2, 3}
    assert 0 < plan["estimate"]["mfu"] <= 1
    # The second call reads the cache. Errors of the configuration come from the other process as one line.
    assert main(command) == 0
    assert "mesh data=2, fsdp=2, tensor=1; batch 64, 16 per device; compiled in" in capsys.readouterr().out
    assert main([*command, "--config.mesh.fsdp=3"]) == 2
    assert capsys.readouterr().err.startswith(
        "tclip plan: error: mesh data=-1, fsdp=3, tensor=1 does not fit 4 devices"
    )
