"""The means of recorded steps, the devices of a run, and runs that cannot be compared."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import ml_collections
import numpy as np
import pytest

from tclip_jax.planning.hardware import parse_topology
from tclip_jax.planning.measured import RecordedRun, find_topology, measure, read_run
from tclip_jax.runs.record import write_record

H100 = {"kind": "NVIDIA H100 80GB HBM3", "count": 8, "processes": 1, "slices": 1, "shape": []}
V5E = {"kind": "TPU v5 lite", "count": 16, "processes": 4, "slices": 1, "shape": [4, 4, 1]}


def recorded(
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
    lines: list[dict[str, Any]],
    devices: Any = H100,
    step: int = 0,
) -> pathlib.Path:
    """Write the record of a run, as `tclip train` does."""
    folder.mkdir(exist_ok=True)
    write_record(
        folder, {"config": json.loads(config.to_json()), "devices": devices}, step, {"remat": [0, 1]} if step else {}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps(count: int, first: int = 1, **values: float) -> list[dict[str, Any]]:
    """Lines of a start: the first step compiles; the next two are slow, while the pipeline fills."""
    lines = []
    for step in range(first, first + count):
        line = {"step": step, "loss": 1.0, "bad_samples": 0.0, "skipped_steps": 0.0}
        seconds = {"seconds/step": 0.5, "seconds/data": 0.0} if step > first + 2 else {"seconds/step": 9.0}
        compiled = {"seconds/compile": 40.0, "programs_compiled": 9.0} if step == first else {}
        lines.append(line | seconds | compiled | (values if step > first + 2 else {}))
    return lines


def test_the_means_of_the_steady_steps(tmp_path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    lines = steps(40)
    random = np.random.default_rng(0)
    for line in lines[3:]:
        line |= {"seconds/step": random.uniform(0.4, 0.6), "seconds/data": random.uniform(0.0, 0.1)}
        line |= {"bad_samples": float(random.integers(5)), "skipped_steps": float(random.integers(2))}
    lines[10] |= {"seconds/checkpoint": 3.0, "seconds/evaluate": 50.0, "programs_compiled": 2.0}
    lines[20] |= {"seconds/step": 7.0, "memory_peak_bytes": 3e9}
    lines[39] |= {"memory_peak_bytes": 4e9}
    lines += [{"step": 40, "trits": {}}, {"step": 40, "zero_shot_accuracy": 0.5}]
    measured = measure(read_run(recorded(tmp_path, config, lines)))
    wait, data = np.array(
        [(line["seconds/step"] + line["seconds/data"], line["seconds/data"]) for line in lines[3:40]]
    ).T
    total, middle = wait.sum() + 3, np.sort(wait)[18]
    assert (measured.first, measured.last, measured.steps) == (4, 40, 37)
    assert measured.seconds == pytest.approx(total / 37, rel=1e-12)
    assert measured.typical == middle
    assert measured.data == pytest.approx(data.sum() / total, rel=1e-12)
    assert measured.checkpoint == pytest.approx(3 / total, rel=1e-12)
    assert measured.stalled == pytest.approx((wait[17] - middle) / total, rel=1e-12)
    assert measured.compiled == 1 / 37 and measured.compile_seconds == 40 and measured.memory == 4e9
    assert measured.masked == pytest.approx(np.mean([line["bad_samples"] for line in lines[3:40]]) / 64)
    assert measured.skipped == sum(line["skipped_steps"] for line in lines[3:40])


def test_each_start_has_first_steps_and_a_change_starts_again(
    tmp_path: pathlib.Path, config: ml_collections.ConfigDict
) -> None:
    resumed = steps(20) + steps(20, first=21)
    assert measure(read_run(recorded(tmp_path, config, resumed))).steps == 34
    recorded(tmp_path, config, resumed, step=20)  # the second start changed a key
    measured = measure(read_run(tmp_path))
    assert (measured.first, measured.steps, measured.memory) == (24, 17, None)


def test_runs_that_cannot_be_compared(tmp_path: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no such file or folder; expected the workdir of `tclip train`"):
        read_run(tmp_path / "none")
    run = recorded(tmp_path, config, [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no steps of the latest configuration: let the run train"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no steps of the latest configuration"):
        read_run(run)
    few = read_run(recorded(tmp_path, config, steps(12)))
    with pytest.raises(ValueError, match=r"has 9 steps that can be compared, without the first 3 of a start: 10 are"):
        measure(few)
    other = config.copy_and_resolve_references()
    other.steps, other.checkpoint.every = 10, 77  # do not change the step
    assert read_run(run, other).lines == few.lines
    for key, value in (("attention", "reference"), ("optimizer.clip_norm", 2.0), ("optimizer.latent_clip", 1.0)):
        changed = other.copy_and_resolve_references()
        changed.update_from_flattened_dict({key: value})
        with pytest.raises(ValueError, match=rf"is a run of another configuration: {re.escape(key)} "):
            read_run(run, changed)
    other.data.batch_size, other.loss.crd = 128, 2.0
    with pytest.raises(
        ValueError,
        match=r"is a run of another configuration: data\.batch_size 64 → 128, loss\.crd 1\.0 → 2\.0; leave out",
    ):
        read_run(run, other)


@pytest.mark.parametrize(
    ("devices", "given", "name"),
    [
        (H100, "", "h100:8"),
        (H100, "h100:8", "h100:8"),
        (V5E, "", "v5e:4x4"),
        (V5E | {"count": 32, "slices": 2}, "", "v5e:4x4"),
        (V5E | {"count": 32, "slices": 2}, "v5e:4x4", "v5e:4x4"),
        (V5E | {"kind": "TPU v4", "shape": [4, 2, 2]}, "", "v4:2x2x4"),
        (V5E | {"kind": "TPU7x", "shape": [2, 2, 2]}, "", "tpu7x:2x2x2"),
        (V5E | {"kind": "TPU v5p", "shape": [4, 4, 4]}, "", "v5p:4x4x4"),
        ({}, "v5e:2x2", "v5e:2x2"),
        (H100 | {"kind": "cpu"}, "h100:8", "h100:8"),
    ],
)
def test_the_topology_is_that_of_the_record(devices: dict[str, Any], given: str, name: str) -> None:
    run = RecordedRun("runs/a", ml_collections.ConfigDict(), devices, [])
    assert find_topology(run, parse_topology(given) if given else None).name == name


@pytest.mark.parametrize(
    ("devices", "given", "words"),
    [
        ({}, "", "runs/a has not recorded its devices: add --topology with the chips"),
        (H100 | {"kind": "cpu"}, "", "runs/a has run on 8 cpu, for which there are no figures: add --topology"),
        (V5E | {"shape": [3, 3, 1]}, "", "runs/a has run on 16 TPU v5 lite, for which there are no figures"),
        (H100, "a100:8", "runs/a has run on 8 NVIDIA H100 80GB HBM3, not on a100:8: leave out --topology"),
        (H100, "h100:16", "runs/a has run on 8 NVIDIA H100 80GB HBM3, h100:16 has 16 devices"),
        (H100 | {"kind": "cpu"}, "h100:4", "runs/a has run on 8 cpu, h100:4 has 4 devices"),
        (V5E, "v5e:2x2", "runs/a has run on 16 TPU v5 lite, v5e:2x2 has 4 devices"),
        (
            V5E | {"kind": "TPU v5p", "count": 256, "shape": [4, 8, 8]},
            "v5p:4x4x16",
            "runs/a has run on v5p:4x8x8, not on v5p:4x4x16: leave out --topology",
        ),
    ],
)
def test_another_topology_is_refused(devices: dict[str, Any], given: str, words: str) -> None:
    run = RecordedRun("runs/a", ml_collections.ConfigDict(), devices, [])
    with pytest.raises(ValueError) as error:
        find_topology(run, parse_topology(given) if given else None)
    assert words in str(error.value)


def test_slices_on_record_are_planned(config: ml_collections.ConfigDict) -> None:
    run = RecordedRun("runs/a", config, V5E | {"slices": 2}, [])
    assert run.planned_config().mesh.slices == 2 and config.mesh.slices == -1
    assert RecordedRun("runs/a", config, H100 | {"slices": 2}, []).planned_config().mesh.slices == -1
