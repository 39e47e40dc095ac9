"""Which checkpoints are kept, and how damage to one is noticed."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.cli import main
from tclip_jax.training import checkpoints, loop
from tclip_jax.training.checkpoints import CheckpointError, Checkpoints, kept, saved_steps, whole_steps
from tclip_jax.training.checksums import damage, write_checksums
from tclip_jax.training.restore import load_model, load_run
from tclip_jax.training.sections import CheckpointConfig


def test_the_newest_and_the_best_are_kept() -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.9, 4: 0.1, 6: 0.2}
    steps = [1, 2, 3, 4, 5, 6]
    assert kept(steps, {}, CheckpointConfig(keep=2, keep_best=3)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=2)) == {5, 6}
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=1)) == {3, 6}  # of equals the newer
    assert kept(steps, scores, CheckpointConfig(keep=1, keep_best=2, best_mode="min")) == {4, 6}
    assert kept(steps, {1: 0.5}, CheckpointConfig(keep=1, keep_best=5)) == {1, 6}
    assert kept([], scores, CheckpointConfig()) == set()


def folder_of(tmp_path: pathlib.Path) -> epath.Path:
    folder = epath.Path(tmp_path) / "7"
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(bytes(range(256)))
    (folder / "data").mkdir()
    (folder / "data" / "metadata").write_text("{}")
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    write_checksums(folder)
    return folder


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(range(255)), "params/d/0 has 255 bytes instead of 256"),
        (bytes(range(255)) + b"x", "params/d/0 is damaged"),
        (None, "params/d/0 is missing"),
    ],
)
def test_every_kind_of_damage_is_named(data: bytes | None, said: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "_CHECKPOINT_METADATA").write_text("what Orbax adds on committing")
    assert damage(folder) is None
    path = folder / "params" / "d" / "0"
    path.unlink() if data is None else path.write_bytes(data)
    assert said in str(damage(folder)) and said in str(damage(folder, "params/"))
    assert damage(folder, "data/") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"params/d/0": 3}', '{"params/d/0": {"bytes": 256}}'])
def test_damaged_checksums(text: str, tmp_path: pathlib.Path) -> None:
    folder = folder_of(tmp_path)
    (folder / "checksums.json").write_text(text)
    assert "checksums.json is damaged" in str(damage(folder))
    (folder / "checksums.json").unlink()  # as older versions left it
    assert damage(folder) is None


def test_damaged_steps_are_set_aside_until_one_is_whole(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path)
    for step in (8, 9):
        (folder.parent / str(step)).mkdir()
        (folder.parent / str(step) / "checksums.json").write_text("{")
    (folder.parent / "9.damaged").mkdir()
    assert saved_steps(tmp_path) == [7, 8, 9] and whole_steps(tmp_path) == [7] == saved_steps(tmp_path)
    assert "9/checksums.json is damaged; renamed to 9.damaged; going on from step 8" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"7", "8.damaged", "9.damaged"}
    assert whole_steps(tmp_path / "nowhere") == []


def test_late_is_told_by_a_clock_that_cannot_be_set(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with Checkpoints(tmp_path / "c", CheckpointConfig(every=10, every_minutes=5)) as saver:
        monkeypatch.setattr(time, "time", lambda: 1e12)
        assert not saver.is_late() and saver.is_due(10) and not saver.is_due(11)
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now + 301)
        assert saver.is_late() and saver.is_due(11, late=True)
    with Checkpoints(tmp_path / "d", CheckpointConfig()) as saver:
        assert not saver.is_late()


def test_a_run_keeps_its_best_step_also_over_a_restart(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved by evaluation; and where a run ended between a checkpoint and its evaluation, that is made up for."""
    accuracies = {2: 0.3, 4: 0.8, 6: 0.1, 8: 0.2}
    evaluated: list[int] = []

    class Fake:
        def __init__(self, _: Any) -> None: ...

        def is_due(self, step: int, steps: int) -> bool:
            return step % 2 == 0

        def is_among(self, names: Any) -> bool:
            return "zero_shot_accuracy" in names

        def __call__(self, model: Any, mesh: Any) -> dict[str, float]:
            step = 2 * len(set(evaluated)) + 2
            if step == 6 and 6 not in evaluated and not resumed:
                raise KeyboardInterrupt
            evaluated.append(step)
            return {"zero_shot_accuracy": accuracies[step]}

    resumed = False
    monkeypatch.setattr(loop, "Evaluation", Fake)
    config.checkpoint.update({"every": 100, "keep": 1, "keep_best": 1})
    config.eval.source = "digits"
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    resumed = True
    loop.train(config, tmp_path / "run")
    assert evaluated == [2, 4, 6, 8] and saved_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["zero_shot_accuracy"]) for line in lines if "loss" not in line] == [*accuracies.items()]
    data = tmp_path / "run" / "checkpoints" / "8" / "data"
    (data.parent / "checksums.json").unlink()  # as older versions left it
    for place, said in (
        ('{"next_index": 3}', "is {'next_index': 3} where"),
        ("{", "Expecting"),
        (None, "No such file"),
    ):
        (data / "metadata").write_text(place) if place else (data / "metadata").unlink()
        with pytest.raises(CheckpointError, match=rf"8/data/metadata: not a checkpoint of .*{said}"):
            loop.train(config, tmp_path / "run")
    # Any command can name the best, or a step; a folder of that name comes first.
    assert [load_run(f"{tmp_path}/run{which}")[0] for which in ("", "@best", "@4", "@8")] == [8, 4, 4, 8]
    best, fourth = (load_model(f"{tmp_path}/run@{which}").params for which in ("best", "4"))
    jax.tree.map(np.testing.assert_array_equal, best, fourth)
    with pytest.raises(CheckpointError, match=r"run/checkpoints: no step 6 is saved there: 4, 8"):
        load_run(f"{tmp_path}/run@6")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"run: metrics.jsonl has zero_shot_accuracy of none of the saved steps"):
        load_run(f"{tmp_path}/run@best")
    (tmp_path / "run").rename(tmp_path / "run@4")
    assert load_run(f"{tmp_path}/run@4")[0] == 8


def test_the_average_of_a_step_can_be_named(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.steps, config.optimizer.ema_decay = 3, 0.25
    config.checkpoint.update({"every": 1, "keep": 3})
    loop.train(config, tmp_path / "run")
    second, third, before, average, newest = (
        load_model(f"{tmp_path}/run@{which}").params for which in ("2", "3", "2-average", "3-average", "average")
    )
    jax.tree.map(np.testing.assert_array_equal, average, newest)
    jax.tree.map(
        lambda old, new, now: np.testing.assert_allclose(now, 0.25 * old + 0.75 * new, rtol=1e-5, atol=1e-7),
        before,
        third,
        average,
    )
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, second)), strict=True))
    assert main(["pack", f"{tmp_path}/run@2-average", "--out", f"{tmp_path}/artifact"]) == 0
    packed = read_artifact(tmp_path / "artifact").params["logit_scale"]
    np.testing.assert_allclose(packed, before["logit_scale"], rtol=1e-3)
    assert json.loads((tmp_path / "artifact" / "tclip.json").read_text())["provenance"]["average"] is True
    (tmp_path / "run" / "checkpoints" / "3" / "average").rename(tmp_path / "average")
    (tmp_path / "run" / "checkpoints" / "3" / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/3: no average is there: config.optimizer.ema_decay keeps"):
        load_run(f"{tmp_path}/run@average")
