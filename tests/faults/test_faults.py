"""Faults in runs: preemption signals, damaged and full disks, dead workers, late hosts, wrong clocks, hangs, NaN."""

from __future__ import annotations

import pathlib
import shutil
import signal
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.faults
Start = Callable[..., Any]
Undisturbed = Callable[[int], Any]


def test_two_undisturbed_runs_of_two_processes_agree_to_the_bit(start: Start, undisturbed: Undisturbed) -> None:
    run = start("again")
    run.finish()
    assert run.steps() == list(range(1, 13)) and run.saved() == [9, 12]
    run.assert_same(undisturbed(2))


@pytest.mark.parametrize(("processes", "signaled"), [(2, 1), (1, 0)])
def test_a_signal_to_one_process_saves_the_same_step_on_all(
    processes: int, signaled: int, start: Start, undisturbed: Undisturbed
) -> None:
    run = start("preempted", processes)
    rarely = "--config.checkpoint.every=1000"  # the signal is the only reason to save
    run.start("slow=0.2", rarely)
    assert run.until(lambda: 3 in run.steps())
    run.children[signaled].send_signal(signal.SIGTERM)
    assert run.wait() == [75] * processes, run.log()
    (step,) = run.saved()
    assert 3 <= step < 12 and run.steps() == list(range(1, step + 1))
    assert f"stopping after a signal: step {step} is saved" in run.log()
    run.finish("", rarely)
    run.assert_same(undisturbed(processes))


def test_ctrl_c_saves_and_requests_no_restart(start: Start) -> None:
    run = start("interrupted", 1)
    run.start("slow=0.2", "--config.checkpoint.every=1000")
    assert run.until(lambda: 2 in run.steps())
    run.children[0].send_signal(signal.SIGINT)
    assert run.wait() == [130] and run.saved() == run.steps()[-1:]


def test_a_run_is_resumed_with_another_number_of_processes(start: Start, undisturbed: Undisturbed) -> None:
    run = start("moved")
    run.start("slow=0.2")
    assert run.until(lambda: 4 in run.steps())
    run.children[0].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75]
    run.processes = 1
    run.finish()
    assert run.steps() == list(range(1, 13))
    losses, expected = ([line["loss"] for line in each.metrics()] for each in (run, undisturbed(2)))
    assert losses == pytest.approx(expected, rel=1e-4)  # the same data; sums in another order


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "part", "processes", "message"),
    [
        (truncate, "params", 1, "bytes instead of"),
        (flip, "training", 2, "is damaged: its checksum differs"),
        (pathlib.Path.unlink, "data", 1, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_detected_and_the_one_before_used(
    harm: Callable[[pathlib.Path], None],
    part: str,
    processes: int,
    message: str,
    start: Start,
    undisturbed: Undisturbed,
) -> None:
    whole, run = undisturbed(processes), start("damaged", processes)
    shutil.copytree(whole.workdir, run.workdir)
    harm(largest(run.workdir / "checkpoints" / "12" / part))
    run.finish()
    assert message in run.log() and "renamed to 12.damaged; resuming from step 9" in run.log()
    run.assert_same(whole)


def test_a_full_disk_is_reported_in_a_line_and_nothing_is_lost(start: Start, undisturbed: Undisturbed) -> None:
    run = start("full", 1)
    run.start("small=6")
    assert run.wait() == [2]
    (line,) = [line for line in run.log().splitlines() if line.startswith("tclip train: error")]
    assert "checkpoints/6: the checkpoint could not be written; step 3 is whole: " in line
    assert "File too large" in line
    assert run.saved() == [3]
    run.finish()
    assert run.saved() == [9, 12] and not list((run.workdir / "checkpoints").glob("6*"))
    run.assert_same(undisturbed(1))


def test_a_disk_that_is_full_at_the_last_byte_of_a_checkpoint(start: Start, undisturbed: Undisturbed) -> None:
    run = start("full")
    run.start("full=6")
    assert run.children[0].wait(300) == 2
    run.end()  # as launchers do
    assert "step 3 is whole: [Errno 28] No space left on device" in run.log()
    assert run.saved() == [3]
    run.finish()
    run.assert_same(undisturbed(2))


@pytest.mark.parametrize(
    ("fault", "process", "file", "why", "errno"),
    [
        ("metrics=5", 0, "metrics.jsonl", "No space left on device", 28),
        ("lost=1", 1, "shard 7", "Input/output error", 5),
        ("lost=5", 1, "shard 7", "Input/output error", 5),
        ("metrics=12", 0, "metrics.jsonl", "No space left on device", 28),  # of the last step
    ],
)
def test_an_error_on_one_process_ends_all_with_its_reason(
    fault: str, process: int, file: str, why: str, errno: int, start: Start, undisturbed: Undisturbed
) -> None:
    run, reason = start("run"), f"[Errno {errno}] {why}: '{file}'"
    run.start(fault)
    assert run.wait() == [2, 2], run.log() + run.log(1)
    assert f"tclip train: error: {file}: {why}" in run.log(process)
    assert f"{reason}\n" in run.log(process) or fault == "lost=1"  # logged at once
    assert f"tclip train: error: process {process}: {reason}" in run.log(1 - process)
    assert 12 not in run.saved() if fault == "metrics=12" else run.saved() == ([3] if fault != "lost=1" else [])
    run.finish()
    run.assert_same(undisturbed(2))


def test_a_killed_data_worker_is_restarted(start: Start, undisturbed: Undisturbed) -> None:
    run = start("worker", 1)
    run.finish("worker=5", "--config.data.workers=1")
    assert "a data worker was killed: restarting the workers" in run.log()
    run.assert_same(undisturbed(1))


@pytest.mark.parametrize("fault", ["late=10", "jumping=5000"])
def test_a_late_host_and_jumping_clocks_change_nothing(fault: str, start: Start, undisturbed: Undisturbed) -> None:
    run = start("run")
    run.finish(fault)
    run.assert_same(undisturbed(2))


def test_a_hanging_process_is_named_and_dumps_its_stacks(start: Start, undisturbed: Undisturbed) -> None:
    run = start("hanging")
    run.start("hang=5", "--config.stall_minutes=0.2", "--config.stall_exit=True")
    assert run.wait() == [69, 69], run.log() + run.log(1)
    assert "no step has ended for 0." in run.log() and "process 1 (" in run.log()
    assert ") is in step 5, waiting for data for" in run.log()
    assert "in before_batch" not in run.log() and "tests/faults/child.py" in run.log(1)
    run.finish()
    run.assert_same(undisturbed(2))


def test_nonfinite_steps_are_skipped_and_end_a_run_without_others(start: Start) -> None:
    run = start("nan", 1)
    run.start("nan=3", "--config.max_skipped_steps=3")
    assert run.wait() == [2] and run.steps() == [1, 2, 3]
    assert (
        "error: step 3: " in run.log()
        and "loss is nan" in run.log()
        and "last of 3 skipped steps in a row" in run.log()
    )
    assert [(line["loss"], line["skipped_steps"]) for line in run.metrics()] == [(None, 1.0)] * 3
    run.finish("nan=2", "--config.max_skipped_steps=3")
    assert [line["skipped_steps"] for line in run.metrics()] == [1.0] * 2 + [0.0] * 10
