"""tclip train --check: everything is opened, nothing is written."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from tclip_jax.cli import main


def test_a_check_opens_everything_and_writes_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "quickstart:teacher,runlocal", "--workdir", str(tmp_path / "run"), "--check"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data         digits train: 16 samples of this process's first batch are usable"
    assert lines[1].startswith("student      5.5 M parameters") and lines[2] == "teacher      none"
    assert lines[3] == "evaluation   digits test" and "GiB on each device" in lines[4]
    assert lines[5].endswith("run: a new run") and lines[-1] == "checked: nothing was trained or written"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.source=folder:/nowhere", "/nowhere"),
        ("eval.source=folder:/nowhere", "/nowhere"),
        ("init=/nowhere", "/nowhere"),
        ("mesh.data=3", "does not fit"),
        ("optimizer.warmup_steps=5000", "is not below config.steps"),
    ],
)
def test_a_check_finds_what_would_stop_the_run(
    change: str, message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--config", "quickstart:teacher,runlocal", "--workdir", str(tmp_path / "run"), "--check"]
    assert main([*words, f"--config.{change}"]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_check_reads_the_teacher(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "quickstart:student,runlocal", "--workdir", str(tmp_path / "run"), "--check"]
    assert main([*words, f"--config.teacher={tmp_path / 'absent'}"]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_workers_ends_without_a_warning(tmp_path: pathlib.Path) -> None:
    run = ["train", "--config", "quickstart:teacher,runlocal", "--workdir", str(tmp_path / "run")]
    changes = ["steps=2", "optimizer.warmup_steps=1", "data.workers=1", "eval.source="]
    command = [sys.executable, "-m", "tclip_jax", *run, *(f"--config.{change}" for change in changes)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr
