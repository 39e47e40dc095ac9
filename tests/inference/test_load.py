"""Loading a step of a run: the newest, the best, a number, or the average of the weights."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from etils import epath

import tclip_jax
from tclip_jax.artifacts.format import read_artifact
from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.inference import load
from tclip_jax.inference.load import Stored, load_model, load_packed, load_run
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.runs.checksums import CheckpointError, write_checksums
from tclip_jax.runs.steps import saved_steps
from tclip_jax.ternary import Quantizer
from tclip_jax.training import loop, session

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.mark.slow
def test_a_run_keeps_its_best_step_over_a_restart(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption between a checkpoint and its evaluation is made up for after the restart."""
    accuracies = {2: 0.3, 4: 0.8, 6: 0.1, 8: 0.2}
    evaluated: list[int] = []

    class Fake:
        def __init__(self, *_: Any) -> None: ...

        def is_due(self, step: int, steps: int) -> bool:
            return step % 2 == 0

        def has_metrics(self, names: Any) -> bool:
            return "zero_shot_accuracy" in names

        def __call__(self, *_: Any) -> dict[str, float]:
            step = 2 * len(set(evaluated)) + 2
            if step == 6 and 6 not in evaluated and not resumed:
                raise KeyboardInterrupt
            evaluated.append(step)
            return {"zero_shot_accuracy": accuracies[step]}

    resumed = False
    monkeypatch.setattr(session, "Evaluation", Fake)
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
    for metadata, message in (
        ('{"next_index": 3}', "is {'next_index': 3}; expected"),
        ("{", "Expecting"),
        (None, "No such file"),
    ):
        (data / "metadata").write_text(metadata) if metadata else (data / "metadata").unlink()
        write_checksums(epath.Path(data.parent))  # the checksums are right, the content is not
        with pytest.raises(CheckpointError, match=rf"8/data/metadata: damaged, or not a checkpoint of .*{message}"):
            loop.train(config, tmp_path / "run")
    # A path can name the best step or a number; an existing folder of that name takes precedence.
    assert [load_run(f"{tmp_path}/run{which}")[0] for which in ("", "@best", "@4", "@8")] == [8, 4, 4, 8]
    best, fourth = (load_model(f"{tmp_path}/run@{which}").params for which in ("best", "4"))
    jax.tree.map(np.testing.assert_array_equal, best, fourth)
    with pytest.raises(CheckpointError, match=r"run/checkpoints: no step 6; saved steps: 4, 8"):
        load_run(f"{tmp_path}/run@6")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"run: metrics.jsonl has no zero_shot_accuracy for the saved steps"):
        load_run(f"{tmp_path}/run@best")
    (tmp_path / "run").rename(tmp_path / "run@4")
    assert load_run(f"{tmp_path}/run@4")[0] == 8


@pytest.mark.slow
def test_the_average_of_a_step_can_be_named(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.steps, config.optimizer.ema_decay = 3, 0.25
    config.checkpoint.update({"every": 1, "keep": 3})
    loop.train(config, tmp_path / "run")
    second, third, before, average, newest = (
        load_model(f"{tmp_path}/run@{which}").params for which in ("2", "3", "2-average", "3-average", "average")
    )
    jax.tree.map(np.testing.assert_array_equal, average, newest)
    jax.tree.map(
        # The average of n steps is Σ dⁿ⁻ⁱ wᵢ / Σ dⁿ⁻ⁱ, so that of two has weight d + d² in that of three.
        lambda old, new, now: np.testing.assert_allclose(now, (0.3125 * old + new) / 1.3125, rtol=1e-5, atol=1e-7),
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
    write_checksums(epath.Path(tmp_path) / "run" / "checkpoints" / "3")
    with pytest.raises(CheckpointError, match=r"checkpoints/3: no average: config.optimizer.ema_decay > 0 stores"):
        load_run(f"{tmp_path}/run@average")
    assert "lean towards the initial weights" not in caplog.text
    (tmp_path / "run" / "history.jsonl").unlink()
    load_run(f"{tmp_path}/run@2-average")
    assert "run: an older version trained it, whose averages lean towards the initial weights" in caplog.text


INCOMPLETE = "checkpoints/3 has no checksums.json: it was not completely copied"


TRAINED: dict[str, pathlib.Path] = {}


@pytest.fixture
def cut_short(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A run with the complete steps 1 and 2, and as step 3 an incomplete copy of step 2 without checksums."""
    config.steps = 2
    config.checkpoint.update({"every": 1, "keep": 2})
    if not TRAINED:  # trained once
        TRAINED["run"] = tmp_path_factory.mktemp("made") / "run"
        loop.train(config, TRAINED["run"])
    shutil.copytree(TRAINED["run"], tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "2", steps / "3", ignore=shutil.ignore_patterns("checksums.json"))
    return tmp_path / "run"


def test_a_run_loads_without_a_warning(cut_short: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    tclip_jax.load(f"{cut_short}@2")
    # Orbax warns through absl, for example of a missing _CHECKPOINT_METADATA.
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_every_reader_takes_the_newest_complete_step_and_logs_it(
    cut_short: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = str(cut_short)

    def took_step_2() -> bool:
        lines = [line for line in caplog.messages if INCOMPLETE in line]
        caplog.clear()
        return bool(lines) and all(line.endswith("reading step 2 instead") for line in lines)

    assert main(["pack", run, "--out", f"{tmp_path}/artifact"]) == 0 and took_step_2()
    assert json.loads((tmp_path / "artifact" / "tclip.json").read_text())["provenance"]["step"] == 2
    assert main(["verify", f"{tmp_path}/artifact", run]) == 0 and took_step_2()
    assert main(["export", run, "--to", "open_clip", "--out", f"{tmp_path}/export"]) == 0 and took_step_2()
    assert main(["compare", "weights", run, f"{tmp_path}/artifact"]) in (0, 1) and took_step_2()
    assert main(["evaluate", run, "--data", "digits"]) == 0 and took_step_2()
    jax.tree.map(np.testing.assert_array_equal, tclip_jax.load(run).params, load_model(f"{run}@2").params)
    assert took_step_2()
    # The incomplete step itself is refused, and so is a run without complete steps.
    assert main(["pack", f"{run}@3", "--out", f"{tmp_path}/never"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("tclip pack: error: ") and INCOMPLETE in line and not (tmp_path / "never").exists()
    for step in (1, 2):
        (cut_short / "checkpoints" / str(step) / "commit_success.txt").unlink()
    with pytest.raises(
        CheckpointError, match=rf"{INCOMPLETE}.*; .*2 has no commit_success.txt.*; .*1 has no commit_success"
    ):
        tclip_jax.load(run)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["init", "teacher", "inherit"])
def test_a_run_starts_from_the_newest_complete_step_of_another(
    key: str, cut_short: pathlib.Path, config: ml_collections.ConfigDict, caplog: pytest.LogCaptureFixture
) -> None:
    config[key], config.loss.crd = str(cut_short), float(key == "teacher")
    loop.train(config, cut_short.parent / key)
    assert any(INCOMPLETE in line and line.endswith("reading step 2 instead") for line in caplog.messages)
    for step in (1, 2):
        (cut_short / "checkpoints" / str(step) / "commit_success.txt").unlink()
    with pytest.raises(CheckpointError, match=INCOMPLETE):
        loop.train(config, cut_short.parent / f"{key} again")


def test_the_best_step_is_the_best_complete_one(cut_short: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "zero_shot_accuracy": step / 10} for step in (1, 2, 3)]
    (cut_short / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert load_run(f"{cut_short}@best")[0] == 2 and "3 has no checksums.json" in caplog.text
    assert load_run(cut_short)[0] == 2


def test_training_resumes_from_the_newest_complete_step(
    cut_short: pathlib.Path, config: ml_collections.ConfigDict, caplog: pytest.LogCaptureFixture
) -> None:
    config.steps = 4
    loop.train(config, cut_short)
    assert "3 has no checksums.json" in caplog.text and "renamed to 3.damaged; resuming from step 2" in caplog.text
    assert saved_steps(cut_short / "checkpoints") == [3, 4]
    steps = [json.loads(line)["step"] for line in (cut_short / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    for step in (3, 4):
        (cut_short / "checkpoints" / str(step) / "commit_success.txt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints: no step is whole: .*; to start again, remove that folder"):
        loop.train(config, cut_short)


@pytest.mark.slow
def test_a_run_is_packed_layer_by_layer_with_the_bias_of_its_dead_zone_weights(
    model_config: CLIPConfig, preprocess: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ternary_rules("Q-ALL", Quantizer(group=12, kind="lsq", dead_zone_bias=0.5))
    params = jax.device_get(init_params(CLIP(model_config, rules), jax.random.key(0)))
    monkeypatch.setattr(load, "load_stored", lambda path: Stored(model_config, preprocess, params, rules))
    packed, expected = flatten(load_packed("run").params), flatten(pack_params(params, rules))
    assert packed.keys() == expected.keys()
    for path, leaf in expected.items():
        jax.tree.map(np.testing.assert_array_equal, packed[path], leaf)
    path = "text/blocks/mlp/fc1/bias"
    assert np.any(packed[path] != flatten(params)[path])


def test_an_artifact_is_loaded_without_orbax_and_training(artifact: pathlib.Path) -> None:
    program = (
        "import sys, tclip_jax; tclip_jax.load(sys.argv[1]).encode_text('a cat'); "
        "print(*(name for name in sys.modules if name.startswith(('orbax', 'tclip_jax.runs', 'tclip_jax.training'))))"
    )
    command = [sys.executable, "-c", program, str(artifact)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == []
