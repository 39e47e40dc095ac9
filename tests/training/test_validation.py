"""The validation loss against NumPy in float64, on one device and on several, and in a run."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tclip_jax.inference.model import Model
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.runs.config import EvalConfig, RunConfig, run_config
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import loop
from tclip_jax.training.build import Build
from tclip_jax.training.evaluation import EvaluationError
from tclip_jax.training.teacher_cache import write_cache
from tclip_jax.training.validation import ValidationLoss

PAIRS, BATCH = 21, 6  # batches of 6, 6, 6 and 3


def write_pairs(folder: pathlib.Path, bad: tuple[int, ...] = ()) -> str:
    rng = np.random.default_rng(0)
    rows = ["path,caption"]
    for i in range(PAIRS):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
        if i in bad:
            (folder / f"{i}.png").write_bytes(b"not an image")
        rows.append(f"{i}.png,picture {i} of many")
    (folder / "pairs.csv").write_text("\n".join(rows))
    return f"csv:{folder}/pairs.csv"


def measured(
    run: RunConfig, source: str, devices: int, state: Any = None
) -> tuple[Any, tuple[dict[str, float], dict[str, int]]]:
    """Returns initial parameters and their validation loss on so many devices."""
    build = Build(run, make_mesh(devices=jax.devices()[:devices]), None)
    with jax.set_mesh(build.mesh):
        params = build.init_state(state and state["clip"]).params
        loss = ValidationLoss(EvalConfig(kind="loss", source=source, split="train", batch_size=BATCH), run)
        return jax.device_get(params), loss(params, build, None)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def oracle(run: RunConfig, params: Any, folder: pathlib.Path, bad: tuple[int, ...]) -> dict[str, float]:
    """InfoNCE of each batch in float64, from the embeddings of the files; a batch counts as often as it has pairs."""
    model = Model(run.model, run.preprocess, params["clip"], run.rules)
    total, hits, pairs, order = 0.0, 0, 0, np.random.default_rng(0).permutation(PAIRS)
    for start in range(0, PAIRS, BATCH):
        kept = [int(i) for i in order[start : start + BATCH] if i not in bad]
        image = model.encode_image([folder / f"{i}.png" for i in kept]).astype(np.float64)
        text = model.encode_text([f"picture {i} of many" for i in kept]).astype(np.float64)
        logits = np.exp(np.float64(params["clip"]["logit_scale"])) * image @ text.T
        for rows in (logits, logits.T):
            total -= np.trace(log_softmax(rows)) / 2
        hits += int((logits.argmax(axis=1) == np.arange(len(kept))).sum())
        pairs += len(kept)
    return {"loss": total / pairs, "loss/task": total / pairs, "batch_accuracy": hits / pairs}


@pytest.mark.parametrize("bad", [(), (3, 11)])
@pytest.mark.parametrize("distributed", ["gather", "ring"])
def test_the_loss_is_that_of_numpy_on_any_number_of_devices(
    bad: tuple[int, ...], distributed: str, config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    config.ternary, config.loss.positives, config.loss.distributed = "Q-ALL", "diagonal", distributed
    config.model.text_cfg.context_length = 16
    run, source = run_config(config), write_pairs(tmp_path, bad)
    for devices in (1, 8):
        params, (metrics, failed) = measured(run, source, devices)
        assert list(metrics) == ["loss", "batch_accuracy", "loss/task"]
        assert metrics == pytest.approx(oracle(run, params, tmp_path, bad), rel=1e-5)
        assert failed == ({"corrupt_image": 2} if bad else {})


def test_data_without_a_usable_pair_have_no_loss(config: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    source = write_pairs(tmp_path, tuple(range(PAIRS)))
    with pytest.raises(ValueError, match=r"^no usable pair: 21 x corrupt_image$"):
        measured(run_config(config), source, 1)
    (tmp_path / "pairs.csv").write_text("path,caption\n")
    with pytest.raises(ValueError, match=r"pairs\.csv"):
        measured(run_config(config), source, 1)


def test_a_loss_that_is_not_finite_is_a_failure(config: ml_collections.ConfigDict, tmp_path: pathlib.Path) -> None:
    run, source = run_config(config), write_pairs(tmp_path)
    params, _ = measured(run, source, 1)
    params["clip"]["logit_scale"] = np.float32(np.nan)
    with pytest.raises(ValueError, match=r"^the loss is nan$"):
        measured(run, source, 1, params)


@pytest.mark.slow
def test_a_run_measures_its_weights_and_their_average(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_pairs(tmp_path, (2,))
    config.model.text_cfg.context_length = 16
    config.steps, config.optimizer.ema_decay, config.loss.positives = 4, 0.5, "diagonal"
    held_out = {"name": "held_out", "kind": "loss", "source": source, "split": "train", "every": 2, "batch_size": BATCH}
    config.evals = (held_out,)
    config.checkpoint.update({"keep_best": 1, "best_metric": "held_out/loss", "best_mode": "min"})
    with caplog.at_level("INFO"):
        model = loop.train(config, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "held_out/loss" in line]
    names = {f"held_out/{name}{of}" for name in ("loss", "loss/task", "batch_accuracy") for of in ("", "_of_average")}
    excluded = {"images_failed/held_out", "images_failed/held_out_of_average"}
    assert [(line["step"], set(line)) for line in lines] == [(step, names | excluded | {"step"}) for step in (2, 4)]
    expected = oracle(run_config(config), {"clip": jax.device_get(model.params)}, tmp_path, (2,))
    assert lines[-1]["held_out/loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert lines[-1]["held_out/loss_of_average"] != lines[-1]["held_out/loss"]
    # One line for each evaluation, and one for the bad sample.
    assert sum("held_out/loss " in line for line in caplog.messages) == 2
    assert caplog.messages.count(f"evaluation of {source}: excluded images: 1 x corrupt_image") == 1


@pytest.mark.slow
def test_all_terms_with_a_teacher_and_those_without_one_with_its_cache(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    source = write_pairs(tmp_path)
    config.steps = 1
    loop.train(config, tmp_path / "teacher")
    config.loss.update({"crd": 1.0, "icl": 1.0, "hidden": 1.0})
    config.evals = ({"name": "v", "kind": "loss", "source": source, "split": "train", "batch_size": BATCH},)

    def measured_by(changes: dict[str, Any], workdir: str) -> dict[str, float]:
        changed = config.copy_and_resolve_references()
        changed.update(changes)
        loop.train(changed, tmp_path / workdir)
        (line,) = (line for line in read_metrics(tmp_path / workdir) if "v/loss" in line)
        return line

    line = measured_by({"teacher": str(tmp_path / "teacher")}, "student")
    terms = {name: line[f"v/loss/{name}"] for name in ("task", "crd", "icl", "hidden")}
    assert all(np.isfinite(value) for value in terms.values()) and line["v/loss"] == pytest.approx(sum(terms.values()))
    config.loss.hidden = 0.0
    teacher = config.copy_and_resolve_references()
    teacher.teacher = "any"
    teacher.evals = ()
    write_cache(tmp_path / "cache", run_config(teacher), str(tmp_path / "teacher"), copies=1)
    line = measured_by({"data": {"teacher_cache": str(tmp_path / "cache")}}, "cached")
    assert {name for name in line if name.startswith("v/loss")} == {"v/loss", "v/loss/task"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "mnist"}, r"^config.evals v: kind loss takes a source, not a suite: remove suite 'mnist'$"),
        ({"split": "train"}, "^config.evals v: kind loss needs held-out pairs, but the run trains on digits, split tr"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str, config: ml_collections.ConfigDict) -> None:
    config.evals = ({"name": "v", "kind": "loss", "source": "digits"} | changes,)
    with pytest.raises(ValueError, match=message):
        run_config(config)


def test_a_cache_and_no_loss_without_a_teacher_contradict(config: ml_collections.ConfigDict) -> None:
    config.eval.update({"kind": "loss", "source": "digits"})
    config.data.teacher_cache = "cache"
    config.loss.update({"task": 0.0, "crd": 1.0})
    with pytest.raises(ValueError, match=r"^config\.eval: kind loss has no loss without a teacher, and a cache"):
        run_config(config)
    config.loss.task = 1.0
    assert run_config(config).eval.kind == "loss"


@pytest.mark.slow
def test_an_evaluation_that_fails_at_first_ends_the_run(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    source = write_pairs(tmp_path, tuple(range(PAIRS)))
    config.eval.update({"kind": "loss", "source": source, "split": "train", "every": 1})
    with pytest.raises(EvaluationError, match=r"^config\.eval: no result at the first evaluation: .*no usable pair"):
        loop.train(config, tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["evaluations_failed"] == 1
