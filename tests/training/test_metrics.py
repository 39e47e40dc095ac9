"""The metrics files of a run have each step once, however often the run was interrupted."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import pathlib
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tclip_jax.models.trits import HISTOGRAM_EDGES
from tclip_jax.runs.record import read_metrics
from tclip_jax.training import metrics as telemetry
from tclip_jax.training.metrics import EventFile, MetricsLogger, Telemetry
from tclip_jax.training.step_log import StepLog
from tclip_jax.training.timing import Throughput

PARTS, ZERO = ("zeros", "flips", "scale", "drift", "saturated"), np.zeros(1)


def open_at(workdir: pathlib.Path, first_step: int = 0, steps: int = 9) -> Telemetry:
    """Telemetry with a unique TensorBoard file, as in a new process; the names have a resolution of seconds."""
    for number, path in enumerate(sorted((workdir / "tensorboard").glob("events.*.[!0-9]*"))):
        path.rename(path.with_name(f"events.out.tfevents.{number}.old"))
    return Telemetry(workdir, first_step=first_step, steps=steps, title="student")


def interrupted_and_resumed(workdir: pathlib.Path, checkpoint: int) -> None:
    """Writes steps 1–4, crashes, and writes the steps from the checkpoint to 6 with another loss."""
    with open_at(workdir) as run:
        for step in range(1, 5):
            run.write(step, {"loss": float(step)})
    with open_at(workdir, checkpoint) as run:
        for step in range(checkpoint + 1, 7):
            run.write(step, {"loss": 10.0 * step})


def events(path: pathlib.Path) -> Iterator[Event]:
    """Yields the events of a TensorBoard file, whose records are length, checksum, data, checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def shown(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """Returns the scalars that TensorBoard shows: a start at a step hides that step and later ones in older files."""
    kept: list[tuple[int, str, float]] = []
    for event in itertools.chain.from_iterable(map(events, sorted((workdir / "tensorboard").iterdir()))):
        if event.session_log.status == SessionLog.START:
            kept = [scalar for scalar in kept if scalar[0] < event.step]
        kept += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return kept


def test_each_call_writes_a_line_of_json(tmp_path: pathlib.Path) -> None:
    with open_at(tmp_path) as run:
        run.write(1, {"loss": jnp.float32(0.5), "learning_rate": np.float32(0.25), "bad_samples": 0})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # at once, not at the end
        run.write(2, {"loss": 0.25})
        run.write(2, {"zero_shot_accuracy": 1.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 0.5, "learning_rate": 0.25, "bad_samples": 0.0},
        {"step": 2, "loss": 0.25},
        {"step": 2, "zero_shot_accuracy": 1.0},
    ]
    assert read_metrics(tmp_path) == lines
    assert shown(tmp_path) == [
        (1, "loss", 0.5),
        (1, "learning_rate", 0.25),
        (1, "bad_samples", 0.0),
        (2, "loss", 0.25),
        (2, "zero_shot_accuracy", 1.0),
    ]


@pytest.mark.parametrize("checkpoint", [0, 1, 3, 4])
def test_after_resuming_each_step_appears_once(checkpoint: int, tmp_path: pathlib.Path) -> None:
    interrupted_and_resumed(tmp_path, checkpoint)
    losses = [(step, step if step <= checkpoint else 10 * step) for step in range(1, 7)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == losses
    assert [(step, value) for step, _, value in shown(tmp_path)] == losses


@pytest.mark.parametrize("checkpoint", [0, 3])
def test_tensorboard_itself_shows_each_step_once(checkpoint: int, tmp_path: pathlib.Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted_and_resumed(tmp_path, checkpoint)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (step, step if step <= checkpoint else 10 * step) for step in range(1, 7)
    ]


def test_a_truncated_last_line_is_dropped(tmp_path: pathlib.Path) -> None:
    whole = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    for cut in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_text(whole[:cut])
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2][: whole[:cut].count("\n")]
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')
    with open_at(tmp_path, first_step=2) as run:
        run.write(3, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == whole + '{"step": 3, "loss": 1.0}\n'


def test_a_run_that_wrote_nothing_has_no_metrics(tmp_path: pathlib.Path) -> None:
    assert read_metrics(tmp_path) == []


def test_an_error_of_the_run_keeps_the_written_metrics(tmp_path: pathlib.Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_at(tmp_path) as run:
        run.write(1, {"loss": 1.0})
        raise KeyboardInterrupt
    assert [line["step"] for line in read_metrics(tmp_path)] == [1] and len(shown(tmp_path)) == 1


def test_an_object_store_has_all_lines_at_the_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "is_local", lambda path: False)
    with open_at(tmp_path) as run:
        for step in range(1, 1003):
            run.write(step, {"loss": 1.0})
            assert len(read_metrics(tmp_path)) == (1000 if step >= 1000 else 0)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 1003))


def test_there_is_no_bar_without_a_terminal(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_at(tmp_path) as run:
        run.write(1, {"loss": 1.0})
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    with open_at(tmp_path, first_step=3) as run:
        run.write(9, {"loss": 1.0})
    assert "student:  33%" in terminal.getvalue() and "3/9" in terminal.getvalue()
    assert "9/9" in terminal.getvalue() and "loss 1.000" in terminal.getvalue()


def test_only_the_first_process_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.jax, "process_index", lambda: 1)
    with open_at(tmp_path) as run:
        run.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_json_has_null_for_nan(tmp_path: pathlib.Path) -> None:
    with open_at(tmp_path) as run:
        run.write(1, {"loss": float("nan"), "gradient_norm": jnp.inf, "learning_rate": 0.5})
        run.write_trits(
            1, {"a": {"histogram": np.full((1, len(HISTOGRAM_EDGES)), np.nan), **dict.fromkeys(PARTS, ZERO)}}
        )
        run.sync()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text.splitlines()[0]) == {"step": 1, "loss": None, "gradient_norm": None, "learning_rate": 0.5}
    assert (1, "learning_rate", 0.5) in shown(tmp_path) and not [each for each in shown(tmp_path) if each[1] == "loss"]


def test_weights_and_biases(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"first_step": 0, "steps": 9, "title": "student", "wandb_project": "p"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"config\.wandb_project is 'p': it needs wandb \(pip install wandb\)"):
        Telemetry(tmp_path, **options)
    assert not (tmp_path / "metrics.jsonl").exists()
    calls: list[Any] = []

    class Fake(types.ModuleType):
        def init(self, **arguments: Any) -> Fake:
            calls.append(arguments)
            return self

        def log(self, scalars: Any, step: int) -> None:
            calls.append((step, scalars))

        def finish(self, exit_code: int) -> None:
            calls.append(exit_code)

    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    for _ in range(2):
        with Telemetry(tmp_path, **options, config={"seed": 3}) as run:
            run.write(1, {"loss": 0.5})
    first, again = calls[:3], calls[3:]
    assert first == again and first[1:] == [(1, {"loss": 0.5}), 0]
    assert first[0].items() >= {"project": "p", "name": "student", "resume": "allow", "config": {"seed": 3}}.items()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("part", ["_append", "EventFile.scalar", "EventFile.flush"])
def test_a_full_disk_is_stored_for_all_processes_and_ends_the_run(
    part: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OSError, match="No space left on device"), open_at(tmp_path) as run:
        run.write(1, {"loss": 1.0})
        with monkeypatch.context() as patch:
            at = EventFile if part.startswith("EventFile") else Telemetry
            patch.setattr(at, part.rpartition(".")[2], full)
            run.write(2, {"loss": 1.0})
            run.sync()
            assert run.failure.error is not None and "No space left on device" in caplog.text
        run.write(3, {"loss": 1.0})
        run.write_trits(3, {})
        run.sync()
    assert [line["step"] for line in read_metrics(tmp_path)] in ([1], [1, 2])  # and nothing after the error


def test_the_error_of_the_run_precedes_errors_of_closing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = EventFile.close

    def failing(self: EventFile) -> None:
        close(self)
        full()

    monkeypatch.setattr(EventFile, "close", failing)
    with pytest.raises(ValueError, match="the run's own"), open_at(tmp_path) as run:
        raise ValueError("the run's own")
    assert run.failure.error is not None


def silent() -> StepLog:
    return StepLog(Throughput(8, 1, jax.devices()[:1]), steps=9, every=0)


class Sink:
    """Stands for telemetry and checkpoints."""

    def write(self, step: int, metrics: Any) -> None: ...

    def score(self, step: int, metrics: Any) -> None: ...


def test_skipped_steps_in_a_row_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    sink: Any = Sink()
    logger = MetricsLogger(sink, sink, silent(), max_skipped=2)
    good, bad = {"loss": 1.0, "skipped_steps": 0.0}, {"loss": float("inf"), "skipped_steps": 1.0}
    for step, metrics in enumerate((bad, good, bad, good, bad), 1):
        logger.add(step, metrics)
    assert "step 3: loss is inf; the step is skipped" in caplog.text and "step 5" not in caplog.text
    logger.add(6, bad)
    with pytest.raises(ValueError, match="step 6: loss is inf; this is the last of 2 skipped steps in a row"):
        logger.flush()


def test_batches_without_a_usable_sample_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    sink: Any = Sink()
    logger = MetricsLogger(sink, sink, silent(), max_skipped=3)
    for step in (1, 2):
        logger.add(step, {"loss": 0.0, "skipped_steps": 1.0})
    logger.flush()
    assert "step 1: its batch has no usable sample; the step is skipped" in caplog.text
    logger.add(3, {"loss": 0.0, "skipped_steps": 1.0})
    with pytest.raises(
        ValueError, match=r"step 3: its batch has no usable .* last of 3 skipped steps .* see bad_samples\.jsonl"
    ):
        logger.flush()


def test_the_error_of_an_unmeasured_best_metric_names_the_nearest() -> None:
    sink: Any = Sink()
    logger = MetricsLogger(sink, sink, silent(), max_skipped=2)
    logger.write(1, {"loss": 1.0, "digits/acc1": 0.5, "zero_shot_accuracy": 0.5})
    logger.check_measured("digits/acc1")
    message = r"best_metric: 'digits/acc' is not measured, so keep_best has no effect: .* such as digits/acc1"
    with pytest.raises(ValueError, match=message):
        logger.check_measured("digits/acc")
