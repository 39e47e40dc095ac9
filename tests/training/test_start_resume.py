"""Changes at a restart are refused without writing files, or logged and recorded."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import ml_collections
import pytest
from PIL import Image

from tclip_jax.cli import main
from tclip_jax.runs.checkpoints import CheckpointError
from tclip_jax.runs.record import read_history
from tclip_jax.training import loop
from tclip_jax.training.start import Resume

DATA = {"source": "digits", "split": "train", "samples": 1400, "content": "aa"}


def started(config: ml_collections.ConfigDict, workdir: pathlib.Path, step: int, **parts: Any) -> Resume:
    workdir.mkdir(exist_ok=True)
    return Resume(config, workdir, step, **({"data": DATA, "teacher": None, "init": None} | parts))


def content_of(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_changes_are_logged_and_recorded(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = {"source": "runs/teacher", "step": 8, "content": "aa"}
    config.teacher = "runs/teacher"
    started(config, tmp_path / "run", 0, teacher=teacher).begin()
    config.loss.crd, config.steps, config.optimizer.learning_rate = 3.0, 20, 0.01
    config.data.source = "folder:/elsewhere"
    config.data.batch_size, config.dtype, config.optimizer.ema_decay = 16, "bfloat16", 0.0
    with caplog.at_level(logging.INFO):
        started(config, tmp_path / "run", 5, teacher=teacher | {"content": "bb"}).begin()
    assert {line for line in caplog.messages if " → " in line} == {
        "loss.crd 0.0 → 3.0 from step 5",
        "steps 8 → 20 from step 5",
        "optimizer.learning_rate 0.001 → 0.01 from step 5",
        "data.source digits → folder:/elsewhere from step 5",
        "data.batch_size 8 → 16 from step 5",
        "dtype float32 → bfloat16 from step 5",
        "teacher.content aa → bb from step 5",
    }
    first, second = read_history(tmp_path / "run")
    assert first["step"] == 0 and first["changed"] == {} and first["config"]["loss"]["crd"] == 0
    assert second["step"] == 5 and second["changed"]["loss.crd"] == [0.0, 3.0] and len(second["changed"]) == 7
    assert second["data"] == DATA and second["teacher"]["content"] == "bb" and second["software"]["tclip_jax"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == second["config"]


@pytest.mark.parametrize(
    ("changed", "step", "message"),
    [
        (
            {"model.embed_dim": 24},
            5,
            r"config\.json: this run has config\.model\.embed_dim = 16, not 24: choose another",
        ),
        ({"ternary": "Q-ALL"}, 5, r"this run has config\.ternary = none, not Q-ALL"),
        ({"quantizer.group": 8}, 5, r"this run has config\.quantizer\.group = 256, not 8"),
        ({"seed": 1}, 5, r"config\.seed = 0, not 1"),
        ({"init": "runs/a"}, 5, r"config\.init = , not runs/a"),
        ({"steps": 4}, 5, r"this run has done 5 steps, more than config\.steps = 4"),
        ({"loss.crd": 3.0}, 8, r"done all its 8 steps with other values: loss\.crd 0\.0 → 3\.0; raise config\.steps"),
        ({"teacher": "runs/a"}, 8, r"with other values: teacher\.source \"\" → runs/a; raise"),
        ({"data.augment": "strong"}, 8, r"with other values: data\.augment none → strong; raise"),
    ],
)
def test_refused_changes_write_nothing(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, changed: dict[str, Any], step: int, message: str
) -> None:
    started(config, tmp_path / "run", 0).begin()
    before = content_of(tmp_path / "run")
    config.update_from_flattened_dict(changed)
    with pytest.raises(ValueError, match=message):
        started(config, tmp_path / "run", step)
    assert content_of(tmp_path / "run") == before


def test_a_finished_run_accepts_changes_that_do_not_affect_weights(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    started(config, tmp_path / "run", 0).begin()
    config.eval.source, config.mesh.data, config.data.workers, config.log_every = "digits", 1, 2, 1
    started(config, tmp_path / "run", 8, data=DATA | {"source": "elsewhere"}).begin()
    with pytest.raises(ValueError, match=r"all its 8 steps with other values: teacher\.content aa → bb"):
        config.teacher = "runs/a"
        started(config, tmp_path / "other", 0, teacher={"source": "runs/a", "content": "aa"}).begin()
        started(config, tmp_path / "other", 8, teacher={"source": "runs/a", "content": "bb"})


def test_keys_that_an_older_run_lacks_have_their_defaults(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    config.optimizer.ema_decay = 0.5
    started(config, tmp_path / "run", 0).begin()
    (tmp_path / "run" / "history.jsonl").unlink()
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    del kept["optimizer"]["ema_decay"], kept["evals"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(kept))
    assert started(config, tmp_path / "run", 5).changed == {"optimizer.ema_decay": [0.0, 0.5]}


@pytest.mark.slow
def test_a_whole_run_its_refusals_and_its_artifact(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refusals for swapped images and a missing average, a changed loss, and the artifact's provenance."""
    for number in range(8):
        path = tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (30 * number, 0, 0)).save(path, compress_level=0)
    config.data.update({"source": f"folder:{tmp_path}/data", "templates": "simple"})
    config.steps, config.checkpoint.every = 2, 1
    loop.train(config, tmp_path / "run")

    before, config.steps = content_of(tmp_path / "run"), 3
    for changed, message in (
        (
            {"optimizer.ema_decay": 0.5},
            r"checkpoints/2: cannot be resumed since optimizer\.ema_decay 0\.0 → 0\.5: it",
        ),
        (
            {"loss.task_kind": "sigmoid"},
            r"since loss\.task_kind info_nce → sigmoid: its training/heads/heads/sigmoid_bias has",
        ),
    ):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changed)
        with pytest.raises(CheckpointError, match=message + r".*; undo the change, or start a new run"):
            loop.train(other, tmp_path / "run")
    image = tmp_path / "data" / "cat" / "1.png"
    was = image.read_bytes()
    Image.new("RGB", (20, 20), (31, 0, 0)).save(image, compress_level=0)
    assert len(image.read_bytes()) == len(was)
    with pytest.raises(CheckpointError, match=r"checkpoints/2/data/metadata: .*\(content: '\w+', not '\w+'\)"):
        loop.train(config, tmp_path / "run")
    assert content_of(tmp_path / "run") == before
    image.write_bytes(was)

    config.loss.task, config.optimizer.clip_norm = 2.0, 1.0  # a resumed run may start to clip
    loop.train(config, tmp_path / "run")
    assert main(["pack", f"{tmp_path}/run", "--out", f"{tmp_path}/artifact"]) == 0
    made = json.loads((tmp_path / "artifact" / "tclip.json").read_text())["provenance"]
    assert made["step"] == 3 and made["data"]["source"] == config.data.source and made["data"]["samples"] == 8
    assert made["changed"] == {"2": {"steps": [2, 3], "loss.task": [1.0, 2.0], "optimizer.clip_norm": [0.0, 1.0]}}
    assert made["software"]["tclip_jax"] and made["metrics"]["loss"] > 0 and "teacher" not in made
    capsys.readouterr()
    assert main(["inspect", f"{tmp_path}/artifact"]) == 0
    assert f"data.content: {made['data']['content']}" in capsys.readouterr().out
    assert main(["export", f"{tmp_path}/artifact", "--to", "open_clip", "--out", f"{tmp_path}/export"]) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "| provenance | |" in card and f"| data.content | {made['data']['content']} |" in card


def test_other_devices_are_recorded_and_allowed(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices = {"kind": "TPU v4", "count": 8, "processes": 2, "slices": 1, "shape": [2, 2, 2]}
    started(config, tmp_path / "run", 0, devices=devices).begin()
    fewer = devices | {"count": 4, "processes": 1, "shape": [2, 2, 1]}
    with caplog.at_level(logging.INFO):
        started(config, tmp_path / "run", config.steps, devices=fewer).begin()  # all steps are done
    assert f"devices.count 8 → 4 from step {config.steps}" in caplog.messages
    assert [line["devices"] for line in read_history(tmp_path / "run")] == [devices, fewer]
