"""Whole runs: their files, exact resumption, and refusals."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import logging
import pathlib
import tarfile
import types
from typing import Any, cast

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

import tclip_jax
from tclip_jax.artifacts import pack_params
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import source_task
from tclip_jax.inference.load import load_run
from tclip_jax.inference.model import Model
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.runs.checkpoints import Checkpoints
from tclip_jax.runs.checksums import CheckpointError
from tclip_jax.runs.config import run_config
from tclip_jax.runs.record import read_metrics
from tclip_jax.runs.steps import saved_steps
from tclip_jax.training import loop, session
from tclip_jax.training.build import Build
from tclip_jax.training.evaluation import Evaluation
from tclip_jax.training.metrics import MetricsLogger, Telemetry


def assert_equal_params(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Telemetry.write

    def stop(self: Telemetry, now: int, metrics: Any) -> None:
        write(self, now, metrics)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Telemetry, "write", stop)


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.ternary = "Q-ALL"
    config.optimizer.warmup_steps = 2
    config.eval.update({"source": "digits", "every": 4})
    whole = loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "cut")
    assert load_run(tmp_path / "cut")[0] == 3  # steps 4 and 5 are repeated
    resumed = loop.train(config, tmp_path / "cut")
    assert_equal_params(whole.params, resumed.params)

    def losses(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name) if "loss" in line]

    # The learning rate of a step's update follows the number of steps before it: that of step 1 is 0.
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole") if "loss" in line]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6))
    np.testing.assert_allclose(rates, 1e-3 * np.array([0, 0.5, *cosine]), atol=1e-9)

    assert losses("cut")[-2:] == losses("whole")[-2:] and [step for step, _ in losses("whole")] == list(range(1, 9))
    assert [line["step"] for line in read_metrics(tmp_path / "whole") if "zero_shot_accuracy" in line] == [4, 8]
    # A third call has nothing to do.
    assert_equal_params(loop.train(config, tmp_path / "cut").params, whole.params)
    # The loaded model is the trained one, and config.json is readable.
    assert_equal_params(tclip_jax.load(tmp_path / "whole").params, whole.params)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["ternary"] == "Q-ALL"
    assert list((tmp_path / "whole" / "tensorboard").iterdir())

    config.ternary = "Q-FFN"
    with pytest.raises(ValueError, match=r"config\.json: this run has config\.ternary = Q-ALL, not Q-FFN"):
        loop.train(config, tmp_path / "whole")


@pytest.mark.slow
def test_several_evaluations_run_at_different_steps(config: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    for name, text in (("cat", "black"), ("dog", "white")):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 20), text).save(folder / "0.png")
    config.steps = 4
    config.eval.update({"source": "digits", "every": 4})
    pictures = {"name": "pictures", "source": f"folder:{tmp_path}/pictures", "templates": "simple", "every": 2}
    config.evals = (pictures, {"name": "digits", "source": "digits", "every": 3, "batch_size": 64})
    model = loop.train(config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" not in line]
    metrics = {"acc1", "mean_per_class_recall"}  # acc5 is undefined for fewer than five classes
    of_pictures = {f"pictures/{metric}" for metric in metrics}
    of_digits = {f"digits/{metric}" for metric in (*metrics, "acc5")}
    assert [(line["step"], set(line) - {"step"}) for line in lines] == [
        (2, of_pictures),
        (3, of_digits),
        (4, {"zero_shot_accuracy"}),
        (4, of_pictures),
        (4, of_digits),
    ]
    # `tclip evaluate` gives the same metrics.
    report = evaluate(Encoder(model), [source_task("digits", "test", "digits")], model="")
    assert report.results["digits"].metrics["acc1"] == lines[2]["zero_shot_accuracy"] == lines[4]["digits/acc1"]
    # config.json, which has a list of evaluations, can be read.
    assert load_run(tmp_path / "run")[0] == 4

    config.evals = ({"name": "exports", "source": str(tmp_path), "suite": "mnist"},)
    with pytest.raises(FileNotFoundError, match="wds_mnist: no such folder"):
        loop.train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_and_their_average_are_evaluated_as_ternary_models(
    config: ml_collections.ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.ternary, config.optimizer.ema_decay = "Q-ALL", 0.5
    build, tokens = Build(run_config(config), make_mesh(8), None), np.array([[1, 2, 3, *[0] * 9]], np.int32)
    with jax.set_mesh(build.mesh):
        state = build.init_state()
    state = state.replace(average=jax.tree.map(lambda leaf: leaf[..., ::-1] if leaf.ndim else leaf, state.average))

    def measure(params: Any, build: Build, teacher_params: Any) -> dict[str, float]:
        model = Model(build.run.model, build.run.preprocess, params["clip"], build.run.rules)
        return {"text": float(model.encode_text(tokens)[0, 0])}

    written: dict[str, float] = {}
    prepared: Any = types.SimpleNamespace(build=build, run=build.run, teacher_params=None)
    trained = session.Session(prepared)
    trained._metrics = types.SimpleNamespace(  # type: ignore[assignment]
        write_evaluation=lambda step, metrics, seconds: written.update(metrics)
    )
    trained._evaluate([cast(Evaluation, measure)], 1, state)
    for name, latent in (("text", state.params["clip"]), ("text_of_average", state.average)):
        ternary, full = pack_params(latent, build.run.rules), jax.device_get(latent)
        unquantized = dataclasses.replace(build.run, ternary="none")
        same, other = (
            measure({"clip": params}, dataclasses.replace(build, run=unquantized), None) for params in (ternary, full)
        )
        assert written[name] == pytest.approx(same["text"], abs=1e-6) and abs(written[name] - other["text"]) > 1e-3


@pytest.mark.slow
def test_distilling_from_a_run(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config.steps = 2
    loop.train(config, "runs/teacher")
    config.model.embed_dim = 8
    config.ternary, config.teacher = "Q-FFN", "runs/teacher"
    config.loss.update({"crd": 1.0, "icl": 1.0, "fd": 1.0})
    config.mesh.update({"data": 4, "fsdp": 2})
    loop.train(config, tmp_path / "student")
    last = read_metrics(tmp_path / "student")[-1]
    assert last["step"] == 2 and all(np.isfinite(last[f"loss/{name}"]) for name in ("task", "crd", "icl", "fd"))
    # The loaded model has no heads.
    assert load_run(tmp_path / "student")[1].params.keys() == {"image", "text", "logit_scale"}

    config.model.vision_cfg.image_size = 32
    with pytest.raises(ValueError, match=r"the teacher's image size is \(16, 16\), the student's \(32, 32\)"):
        loop.train(config, tmp_path / "other")


@pytest.mark.slow
def test_unreadable_image_is_counted_and_its_path_listed(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(8):
        path = tmp_path / "data" / "train" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(path)
    bad = tmp_path / "data" / "train" / "cat" / "bad.png"
    bad.write_bytes(b"not an image")
    config.data.update(
        {"source": f"folder:{tmp_path}/data", "templates": "simple", "batch_size": 8, "max_bad_share": 0.2}
    )
    config.steps = 9  # eight epochs of nine images
    with caplog.at_level(logging.WARNING):
        loop.train(config, tmp_path / "run")
    assert sum(line["bad_samples"] for line in read_metrics(tmp_path / "run")) == 8
    assert str(bad) in (tmp_path / "run" / "bad_samples.jsonl").read_text()
    assert caplog.messages == [
        f"8 of 72 samples were bad (corrupt_image 8), listed in {tmp_path}/run/bad_samples.jsonl"
    ]


def write_tar(path: pathlib.Path, image: bytes, samples: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            for suffix, data in (("jpg", image), ("txt", b"a picture")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.slow
def test_a_short_run_without_a_usable_sample_fails(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command exits with code 2, and saves nothing, so that the next call fails too."""
    monkeypatch.setenv("TCLIP_CACHE_DIR", str(tmp_path / "cache"))
    write_tar(tmp_path / "0.tar", b"\xff\xd8\xff no image", 40)
    config.data.update({"source": f"wds:{tmp_path}/0.tar", "max_bad_share": 1.0})
    config.steps = 2
    with pytest.raises(ValueError, match=r"^none of all 16 samples is usable \(corrupt_image 16\), listed in"):
        loop.train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["skipped_steps"], line["bad/corrupt_image"]) for line in lines] == [
        (1, 1, 8),
        (2, 1, 8),
    ]
    assert not saved_steps(tmp_path / "run" / "checkpoints")


def test_an_evaluation_without_readable_images_ends_the_run(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    for i in range(4):
        path = tmp_path / "data" / "test" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    config.eval.update({"source": f"folder:{tmp_path}/data", "templates": "simple", "every": 1})
    message = r"config\.eval: no result at the first evaluation: .*no usable image: 4 x unreadable image"
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 1] and lines[1] == {"step": 1, "evaluations_failed": 1.0}


def live_bytes() -> int:
    gc.collect()
    return sum(each.nbytes for each in jax.live_arrays())


@pytest.mark.slow
def test_a_resumed_run_has_one_copy_of_its_state(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has neither the initial weights nor a second copy of the teacher."""
    config.steps, before = 1, live_bytes()
    loop.train(config, tmp_path / "teacher")
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(load_run(tmp_path / "teacher")[1].params))
    held: dict[str, float] = {}
    restore, flush = Checkpoints.restore, MetricsLogger.flush

    def restored(self: Checkpoints, *arguments: Any) -> Any:
        held["before"] = (live_bytes() - before) / weights
        trees = restore(self, *arguments)
        held["restored"] = (live_bytes() - before) / weights
        return trees

    def flushed(self: MetricsLogger) -> None:
        held["step"] = (live_bytes() - before) / weights
        flush(self)

    monkeypatch.setattr(Checkpoints, "restore", restored)
    monkeypatch.setattr(MetricsLogger, "flush", flushed)
    config.update({"init": str(tmp_path / "teacher"), "teacher": str(tmp_path / "teacher")})
    config.loss.crd = 1.0
    loop.train(config, tmp_path / "run")
    assert held["step"] == pytest.approx(4, abs=0.1)  # weights, two moments, and the teacher
    config.steps = 2
    loop.train(config, tmp_path / "run")
    assert held["before"] == pytest.approx(1, abs=0.1) and held["restored"] == pytest.approx(4, abs=0.1)
    assert held["step"] == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.batch_size": 12}, "global batch 12 is not divisible by 8 devices"),
        (
            {"data.batch_size": 8, "data.microbatches": 2},
            r"the 1 rows of a device, .* are not divisible by .*batches 2",
        ),
        ({"mesh.data": 3}, "mesh data=3, fsdp=1, tensor=1 does not fit 8 devices"),
        ({"data.source": "imagenet"}, "unknown data source 'imagenet'"),
        ({"teacher": "nowhere"}, "nowhere: no such file or folder; expected the workdir"),
    ],
)
def test_invalid_runs_are_refused(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_foreign_and_damaged_checkpoints(config: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    config.steps = 1
    workdir = tmp_path / "run"
    loop.train(config, workdir)
    # A folder that Orbax has not finished is not a checkpoint.
    unfinished = workdir / "checkpoints" / "7.orbax-checkpoint-tmp-7"
    unfinished.mkdir()
    assert load_run(workdir)[0] == 1

    resolved = json.loads((workdir / "config.json").read_text())
    resolved["model"]["embed_dim"] = 24
    (workdir / "config.json").write_text(json.dumps(resolved))
    mismatch = r"image/projection/kernel has shape \(16, 16\), the model's is \(16, 24\)"
    with pytest.raises(
        CheckpointError, match=rf"checkpoints/1/params: damaged, or not a checkpoint of this configuration.*{mismatch}"
    ):
        load_run(workdir)

    resolved["model"]["embed_dim"] = 16
    (workdir / "config.json").write_text(json.dumps(resolved))
    for path in (workdir / "checkpoints" / "1" / "params").rglob("*"):
        if path.is_file() and "manifest" in path.name:
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(CheckpointError, match=r"checkpoints/1/params/manifest\.ocdbt has 10 bytes instead of \d+"):
        load_run(workdir)

    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"checkpoints: no checkpoint; expected a folder written by"):
        load_run(workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json.* not JSON"):
        tclip_jax.load(workdir)
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder"):
        tclip_jax.load(tmp_path / "nothing")


@pytest.mark.slow
def test_all_parts_of_the_schedule_in_one_resumed_run(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has inherited weights, a blend, learned scales, groups, recovery, an average and telemetry."""
    wider = config.copy_and_resolve_references()
    wider.model.text_cfg.layers, wider.model.vision_cfg.width, wider.steps = 2, 24, 1
    loop.train(wider, tmp_path / "wider")
    config.inherit = str(tmp_path / "wider")
    config.ternary = [(".*/mlp/.*", {"kind": "lsq", "group": 8}), ("image/patch_embedding/kernel", {"kind": "seq"})]
    config.ternary_warmup_steps, config.telemetry_every = 3, 2
    config.optimizer.update({"recovery_steps": 2, "recovery_learning_rate": 1e-5, "ema_decay": 0.5, "warmup_steps": 1})
    config.optimizer.groups = ((".*/kernel_scale", {"learning_rate": 0.1}),)
    config.eval.update({"source": "digits", "every": 8})
    whole = loop.train(config, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    looks = [line for line in lines if "trits" in line]
    assert [line["step"] for line in looks] == [2, 4, 6, 8]
    assert looks[0]["trits"]["image/blocks/mlp/fc1/kernel"].keys() >= {"zeros", "flips", "scale", "saturated"}
    accuracies = [line for line in lines if "zero_shot_accuracy" in line]
    assert len(accuracies) == 1 and "zero_shot_accuracy_of_average" in accuracies[0]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates[-2:] == pytest.approx([1e-5, 1e-5]) and rates[1] == pytest.approx(1e-3)
    assert "kernel_scale" in whole.params["image"]["blocks"]["mlp"]["fc1"]
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "cut")
    resumed = loop.train(config, tmp_path / "cut")
    assert_equal_params(whole.params, resumed.params)
    assert [line for line in read_metrics(tmp_path / "cut") if "zero_shot_accuracy" in line] == accuracies
    assert_equal_params(tclip_jax.load(tmp_path / "whole").params, whole.params)


@pytest.mark.slow
def test_soft_trits_resume_while_they_anneal_and_the_packed_model_is_the_trained_one(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 8 steps: 2 blended, 5 annealed, 1 hard; with dead-zone biases, clipping, microbatches and an average."""
    config.ternary, config.quantizer.group, config.quantizer.dead_zone_bias = "Q-ALL", 8, 0.25
    config.ternary_warmup_steps, config.ternary_anneal_steps = 2, 5
    config.data.batch_size, config.data.microbatches = 16, 2
    config.optimizer.update({"latent_clip": 1.5, "ema_decay": 0.5, "warmup_steps": 1, "recovery_steps": 2})
    config.optimizer.update({"recovery_learning_rate": 1e-4, "recovery_decay": "cosine"})
    whole = loop.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "cut")
    assert_equal_params(whole.params, loop.train(config, tmp_path / "cut").params)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole") if "learning_rate" in line]
    assert rates[-2:] == pytest.approx([1e-4, 5e-5]) and rates[1] == pytest.approx(1e-3)
    packed = Model(whole.config, whole.preprocess, pack_params(whole.params, whole.rules))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for a, b in ((whole, packed), (tclip_jax.load(tmp_path / "whole"), packed)):
        np.testing.assert_allclose(a.encode_image(images), b.encode_image(images), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.encode_text(["one", "two"]), b.encode_text(["one", "two"]), rtol=1e-5, atol=1e-6)
