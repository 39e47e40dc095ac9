"""Plans as text and JSON, sweeps, the cache of compiled plans, and error messages."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import threading
from typing import Any

import ml_collections
import pytest

from tclip_jax.cli import main
from tclip_jax.data.embedding_store import TeacherCache
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.flops import image_flops, text_flops
from tclip_jax.models.presets import model_cfg
from tclip_jax.planning import child
from tclip_jax.planning.collectives import Collective
from tclip_jax.planning.estimate import StepFacts, formula_facts
from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.hlo import Array
from tclip_jax.planning.liveness import LiveArray, Peak
from tclip_jax.planning.plan import Plan, explain_text, make_plan, plan_text
from tclip_jax.planning.roofline import Speed
from tclip_jax.planning.sweep import Point, _figure, best, parse_grid
from tclip_jax.planning.teachers import find_teacher
from tclip_jax.runs.config import run_config

RECIPE = ["plan", "--config", "ternaryclip:Q-ALL", "--topology"]
H100 = parse_topology("h100:8")


def changed(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, facts=dataclasses.replace(plan.facts, **changes))


def test_a_plan_states_whether_it_fits(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    assert plan.fits and plan_text(plan).splitlines()[1].startswith("fits: 0.")
    assert f" of {80e9 / 2**30:.1f} GiB per device, 0%" in plan_text(plan)
    large = changed(plan, memory=dataclasses.replace(plan.facts.memory, temporaries=10**11))
    assert not large.fits and "does NOT fit: 93.15 of 74.5 GiB per device, 125%" in plan_text(large)
    assert large.to_json()["fits"] is False and large.to_json()["memory"]["total"] > 10**11
    text = plan_text(plan)
    assert "8 chips, mesh data=4, fsdp=2, tensor=1; batch 64, 8 per device; by formula" in text
    assert "v5e:4x4 (v5litepod-16): " in plan_text(dataclasses.replace(plan, topology=parse_topology("v5e:4x4")))


def test_speed_time_and_cost_are_ranges_whose_ends_are_explained(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100, price=2.0, efficiency=0.25)
    slow = Speed(seconds=8.0, mfu=0.2, images_per_second=5000.0, hours=40.0, chip_hours=320.0, cost=640.0)
    fast = Speed(seconds=2.0, mfu=0.8, images_per_second=20_000.0, hours=10.0, chip_hours=80.0, cost=160.0)
    time = dataclasses.replace(plan.estimate, compute=2.0, memory=1.0, network=0.5, slow=slow, fast=fast)
    lines = plan_text(dataclasses.replace(plan, estimate=time)).splitlines()
    assert lines[2:6] == [
        "5,000 to 20,000 images/s, 625 to 2,500 per chip; 20% to 80% MFU",
        "1,000 steps: 10 to 40 hours, 80 to 320 chip-hours, a cost of 160 to 640",
        "  slow end: matrix products at 25% of the peak rate, an assumption that --efficiency changes",
        "  fast end: a bound that no run passes: peak rates, everything overlaps, compute takes longest",
    ]
    serial = dataclasses.replace(time, memory=9.0, slow=dataclasses.replace(slow, seconds=11.5))
    text = plan_text(dataclasses.replace(plan, estimate=serial))
    assert "slow end: peak rates, nothing overlaps: slower than matrix products at 25% of the peak rate" in text
    assert "everything overlaps, HBM takes longest" in text


def test_what_the_peak_consists_of_is_explained(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    assert explain_text(plan) == "--explain needs a compiled plan: plans for h100 are by formula"
    assert "asynchronous" not in plan_text(plan)
    arrays = (
        LiveArray("jvp(CLIP)/text/token_embedding/add", "ternary/sums.py:19", Array("f32", (64, 2, 256)), 3 * 2**20),
        LiveArray("state/params/clip/image/projection/kernel", "", Array("f32", (512, 512)), 2**20),
    )
    gib = 2**30
    peak = Peak(gib, 2 * gib, 3 * gib, gib // 8, "jvp(CLIP)/text/token_embedding/add", "ternary/sums.py:19", 90, arrays)
    plan = changed(plan, how="compiled", peak=3 * gib, at_peak=peak)
    assert explain_text(plan).splitlines() == [
        "HBM at its peak: 3.000 GiB = 1.000 of inputs + 2.000 of temporaries, which reserve 3.000 with fragmentation",
        "during jvp(CLIP)/text/token_embedding/add (ternary/sums.py:19)",
        "the largest 2 of 90 arrays, 0% of it, on one device:",
        "MiB  without padding  array          what it is",
        "3.0              0.1  f32[64,2,256]  jvp(CLIP)/text/token_embedding/add  (ternary/sums.py:19)",
        "1.0              1.0  f32[512,512]   state/params/clip/image/projection/kernel",
    ]
    on_chip = changed(plan, at_peak=dataclasses.replace(peak, temporaries=0), peak=gib + gib // 8)
    assert "peak of live arrays is 1.125 GiB: it counts 0.125 GiB of on-chip memory" in explain_text(on_chip)
    other = changed(plan, peak=4 * gib)
    assert explain_text(other).splitlines()[-1] == "the compiler's peak of live arrays is 4.000 GiB"
    pair = Collective("all-gather", (Array("bf16", (2**20,)),), ("fsdp",), 2, 3, "", is_async=True)
    plan = changed(plan, collectives=(pair, dataclasses.replace(pair, is_async=False, times=1)))
    assert "asynchronous: 3 of 4 collectives, 3.0 of 4.0 MiB sent; " in plan_text(plan)


def test_microbatches_take_less_memory_and_one_more_forward_pass(config: ml_collections.ConfigDict) -> None:
    config.data.batch_size = 8192
    whole = make_plan(config, H100)
    config.data.microbatches = 4
    parts = make_plan(config, H100)
    assert parts.facts.memory.temporaries < whole.facts.memory.temporaries
    student = image_flops(parts.run.model) + text_flops(parts.run.model)
    assert parts.pair_flops - whole.pair_flops == student
    assert parts.estimate.fast.mfu < whole.estimate.fast.mfu and "1,024 per device in 4 microbatches" in plan_text(
        parts
    )
    config.loss.hidden = 1.0  # the teacher, of the same shape, runs twice too
    assert make_plan(config, H100).pair_flops - whole.pair_flops == 2 * student


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
    text, log = capsys.readouterr()
    header, *rows = text.splitlines()
    names = ["batch_size", "fsdp", "remat", "fits", "GiB", "optimizer", "GiB", "bound", "by", "images/s", "MFU", "%"]
    assert header.split() == [*names, "hours", "chip-hours"]
    assert rows[0].split()[:6] == ["1", "32768", "1", "True", "yes,", "12%"] and rows[2].split()[4:] == ["-"] * 8
    assert "matrix products at 50% of the peak rate, an assumption" in text
    assert "batch_size=32768, fsdp=3, remat=True: mesh data=-1, fsdp=3, tensor=1 does not fit 64 devices" in text
    assert "best at the slow end that fits: batch_size=32768, fsdp=1, remat=False, " in text
    assert "1 of 4: batch_size=32768, fsdp=1, remat=True: " in log and "4 of 4: " in log
    points = json.loads((out / "sweep.json").read_text())
    assert len(points) == 4 and sum(point["plan"] is None for point in points) == 2
    assert (out / "sweep.html").read_text().count("<img") == 1
    # Remat needs more time and less memory.
    stored, recomputed = points[1]["plan"], points[0]["plan"]
    assert stored["estimate"]["serial"] < recomputed["estimate"]["serial"]
    assert stored["estimate"]["slow"]["hours"] > stored["estimate"]["fast"]["hours"]
    assert stored["memory"]["total"] > recomputed["memory"]["total"]


def test_a_sweep_shows_the_memory_of_each_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """AdamW has two moments of each parameter, Lion one; the first may be bfloat16; frozen parameters have none."""
    frozen = "optimizer.groups=(),[('clip/image/.*', None)]"
    sweep = ["--sweep", "optimizer.name=adamw,lion", "optimizer.mu_dtype=float32,bfloat16", frozen]
    assert main([*RECIPE, "h100:8", *sweep, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    memory = [point["plan"]["memory"] for point in points]
    moments = [each["optimizer"] / each["parameters"] for each in memory]
    image = 1 - moments[1] / moments[0]
    assert moments[::2] == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=1e-3) and 0.5 < image < 0.6
    assert moments[1::2] == pytest.approx([each * (1 - image) for each in moments[::2]], rel=1e-3)
    assert main([*RECIPE, "h100:8", *sweep]) == 0
    column = [line.split("%  ")[1].split()[1] for line in capsys.readouterr().out.splitlines()[1:9]]
    assert column == [f"{each['optimizer'] / 2**30:.3f}" for each in memory]


def test_the_best_is_the_fastest_that_fits(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    slow = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, memory=9.0))
    large = changed(plan, memory=dataclasses.replace(plan.facts.memory, temporaries=10**11))
    points = [Point({"a": "1"}, slow), Point({"a": "2"}, large), Point({"a": "3"}, plan), Point({"a": "4"}, None, "no")]
    assert best(points) is points[2] and best(points[1:2]) is None


def test_grids() -> None:
    assert parse_grid(["batch_size=1,2", "remat=True"]) == [
        {"data.batch_size": "1", "remat": "True"},
        {"data.batch_size": "2", "remat": "True"},
    ]
    groups = parse_grid(["optimizer.groups=(),[('clip/(image|text)/.*', None), ('x', {'learning_rate': 0.1})]"])
    assert [each["optimizer.groups"] for each in groups] == [
        "()",
        "[('clip/(image|text)/.*', None), ('x', {'learning_rate': 0.1})]",
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
    assert len(requests) == 1 and again.facts == first.facts and again.estimate.slow.cost
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
        (["v5e:3x3"], "there is no topology 'v5e:3x3': write v5litepod-16 for 16 chips, or v5e: with a shape: 1x1, 2"),
        (["v5litepodd-16"], "'v5litepodd-16': write v5litepod-16 for 16 chips, or v5e: with a shape: 1x1, 2x2"),
        (["v4-33"], "'v4-33': write v4-32 for 16 chips of 2 TensorCores, or v4: with a shape: 2x2x1"),
        (["h100"], "there is no topology 'h100': write h100:N for N GPUs, 1 to 4,096, such as h100:64"),
        (["gh200:0"], "there is no topology 'gh200:0': write h200:N for N GPUs"),
        (["zzz"], "there is no topology 'zzz': choose from v5e, v6e: 1x1"),
        (["h100:64", "--config.teacher=runs/none"], "add --teacher-preset"),
        (["h100:64", "--teacher-preset", "ViT-L"], "the nearest is 'ViT-L-14'"),
        (["h100:64", "--sweep", "batch=1,2"], "config has no 'batch': the nearest is 'data.batch_size'"),
        (["h100:64", "--explain", "--sweep", "remat=1"], "--explain describes one plan: leave out --sweep"),
        (["h100:64", "--sweep", "mesh.fsdp=3"], "no point of the sweep can be planned; fsdp=3: "),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, *arguments]) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    assert error.startswith("tclip plan: error: ") and words in error
    assert len(lines) == ("fsdp=3" in words)  # a sweep logs each of its points


def test_a_machine_without_libtpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: None)
    assert main([*RECIPE, "v5e:2x2", "--cache", ""]) == 2
    assert "libtpu, the compiler for TPUs, is not installed: pip install 'tclip-jax[plan]'" in capsys.readouterr().err


def test_another_libtpu_is_refused_before_it_compiles(
    config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"jax": "0.10.2", "libtpu": "0.0.52"}
    monkeypatch.setattr(child.importlib.metadata, "version", versions.get)
    monkeypatch.setattr(child.importlib.metadata, "requires", lambda name: ['libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(child.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(child.subprocess, "Popen", None)
    with pytest.raises(ValueError, match=r"libtpu is 0\.0\.52, but jax 0\.10\.2 needs ==0\.0\.42\.\*: pip install"):
        make_plan(config, parse_topology("v6e:2x2"))


def test_the_log_says_what_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """On a terminal a bar shows it; pytest's stderr is none."""
    done = threading.Event()
    done.set()
    with caplog.at_level("INFO", "tclip_jax"):
        child._show_progress("v5e:4x4", done)
    assert caplog.messages == ["compiling for v5e:4x4: minutes for a model of full size"]


def test_every_point_has_a_row_in_the_plot_and_nothing_is_clipped(config: ml_collections.ConfigDict) -> None:
    plan = make_plan(config, H100)
    large = changed(plan, memory=dataclasses.replace(plan.facts.memory, temporaries=10**11))
    figure = _figure([Point({"a": "1"}, plan), Point({"a": "2"}, None, "no"), Point({"a": "3"}, large)])
    memory, speed = figure.axes
    assert [label.get_text() for label in memory.get_yticklabels()] == ["1", "3"]
    (limit,) = (line for line in memory.lines if "memory of a device, 74.5 GiB" in str(line.get_label()))
    ends = [max(bar.get_x() + bar.get_width() for bar in memory.patches), limit.get_xdata()[0]]
    assert ends == pytest.approx([large.facts.memory.total / 2**30, 80e9 / 2**30])
    assert max(ends) < memory.get_xlim()[1] and memory.get_ylim() == speed.get_ylim()
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in (*memory.get_yticklabels(), *figure.legends[0].get_texts())]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.tpu_compile
def test_the_command_on_a_small_topology(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--config.model.embed_dim=64", "--config.dtype=bfloat16", "--config.teacher=tiny", "--config.mesh.fsdp=2"]
    text = ["--config.model.text_cfg.context_length=32", "--config.data.batch_size=64"]
    command = ["plan", "--config", "ternaryclip:Q-ALL,runlocal", "--topology", "v5e:2x2", *tiny, *text]
    command += ["--cache", str(tmp_path)]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["how"] == "compiled" and plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and plan["fits"]
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["parameters"], rel=1e-3)
    assert plan["links"] and all(each["axes"] for each in plan["collectives"])
    assert {each["times"] for each in plan["collectives"]} >= {1, 2, 3}
    # Here the compiler's own peak counts on-chip memory, whose ranges it does not state for every buffer.
    at_peak = plan["at_peak"]
    assert at_peak["temporaries"] < at_peak["on_chip"]
    assert plan["peak"] == pytest.approx(at_peak["inputs"] + at_peak["on_chip"], rel=2e-3)
    assert 0 < sum(each["is_async"] for each in plan["collectives"]) < len(plan["collectives"])
    assert 0 < plan["estimate"]["slow"]["mfu"] < plan["estimate"]["fast"]["mfu"] <= 1
    assert "compiling for v5e:2x2" in captured.err
    # The second call reads the cache. Errors of the configuration come from the other process as one line.
    assert main([*command, "--explain"]) == 0
    text = capsys.readouterr().out
    assert "mesh data=2, fsdp=2, tensor=1; batch 64, 16 per device; compiled in" in text
    assert "f32[24704,64]   state/params/clip/text/token_embedding/embedding\n" in text
    assert main([*command, "--config.mesh.fsdp=3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tclip plan: error: mesh data=-1, fsdp=3, tensor=1 does not fit 4 devices")
