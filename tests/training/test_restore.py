"""A step of a run by its name: the newest, the best, a number, the average of the weights."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from tclip_jax.artifacts.format import read_artifact
from tclip_jax.cli import main
from tclip_jax.runs.checkpoints import CheckpointError, saved_steps
from tclip_jax.training import loop
from tclip_jax.training.restore import load_model, load_run


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
