"""`launch/local`: the processes that it starts, its restarts, and its signals."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Start of a stub: i is the number of the process, k counts its starts from 1.
TCLIP = """
i=${TCLIP_PROCESS_ID:-0}
echo x >> $CALLS.$i
k=$(wc -l < $CALLS.$i)
"""
Stub = Callable[[str, str], None]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stub(stub: Stub) -> Stub:
    """Writes a `tclip` that accepts every command at `tclip launch check`."""
    return lambda name, text: stub(name, f'[ "$1 $2" != "launch check" ] || exit 0\n{text}')


def count(tmp_path: pathlib.Path, process: int = 0) -> int:
    path = tmp_path / f"tclip.calls.{process}"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_each_process_has_its_number_and_only_the_first_writes_to_stdout(stub: Stub, launch: Run) -> None:
    stub("tclip", 'echo "$TCLIP_PROCESS_ID/$TCLIP_NUM_PROCESSES/$TCLIP_PROCESSES_PER_HOST $TCLIP_COORDINATOR $*"')
    ran = launch("local", "-n", "3", "--port=25000", "--", "train", "--config.x=a b")
    assert (ran.returncode, ran.stdout) == (0, "0/3/3 localhost:25000 train --config.x=a b\n")
    assert sorted(ran.stderr.splitlines()) == [
        "[1] 1/3/3 localhost:25000 train --config.x=a b",
        "[2] 2/3/3 localhost:25000 train --config.x=a b",
    ]


def test_one_process_has_no_coordinator(stub: Stub, launch: Run) -> None:
    stub("tclip", 'echo "$* ${TCLIP_COORDINATOR-none}"')
    assert launch("local", "--", "params").stdout == "params none\n"


def test_it_restarts_after_each_preemption(stub: Stub, launch: Run, tmp_path: pathlib.Path) -> None:
    stub("tclip", TCLIP + "[ $k -gt 5 ] || exit 75")
    ran = launch("local", "-n", "2", "--restarts", "0", "--", "train")
    assert ran.returncode == 0 and (count(tmp_path, 0), count(tmp_path, 1)) == (6, 6)
    assert ran.stderr.count("launch/local: preempted after a checkpoint was saved: restarting\n") == 5


@pytest.mark.parametrize(("end", "code"), [("kill -9 $$", 137), ("kill -ABRT $$", 134), ("exit 69", 69)])
def test_it_restarts_a_few_times_after_a_signal_or_a_lost_process(
    end: str, code: int, stub: Stub, launch: Run, tmp_path: pathlib.Path
) -> None:
    stub("tclip", TCLIP + f"[ $k -gt 2 ] || [ $i -eq 0 ] || {end}\n[ $k -gt 2 ] || {{ sleep 0.5; exit 1; }}")
    ran = launch("local", "-n", "2", "--", "train")
    assert ran.returncode == 0 and count(tmp_path) == 3
    assert f"exit code {code}: restarting, 2 restarts left" in ran.stderr
    ran = launch("local", "-n", "2", "--restarts", "0", "--", "train")
    assert ran.returncode == 0  # the third start has happened, so the stub succeeds


def test_restarts_are_bounded(stub: Stub, launch: Run, tmp_path: pathlib.Path) -> None:
    stub("tclip", TCLIP + "kill -9 $$")
    ran = launch("local", "--restarts", "2", "--", "train")
    assert ran.returncode == 137 and count(tmp_path) == 3
    assert ran.stderr.splitlines()[-1] == "launch/local: exit code 137, no restart left"


@pytest.mark.parametrize("code", [1, 2, 42])
def test_any_other_exit_code_ends_the_run(code: int, stub: Stub, launch: Run, tmp_path: pathlib.Path) -> None:
    stub("tclip", TCLIP + f"[ $i -eq 0 ] || exit {code}\nsleep 0.5\nkill -ABRT $$")
    ran = launch("local", "-n", "2", "--", "train")
    assert ran.returncode == code and count(tmp_path) == 1


def start(environ: dict[str, str], tmp_path: pathlib.Path, processes: int) -> subprocess.Popen[bytes]:
    script = [str(ROOT / "launch" / "local"), "-n", str(processes), "--", "train"]
    # A test suite in the background ignores SIGINT, and a shell cannot trap what it inherits as ignored.
    started = subprocess.Popen(["env", "--default-signal=INT", *script], env=environ, start_new_session=True)
    while any(count(tmp_path, i) == 0 for i in range(processes)):
        assert started.poll() is None
        time.sleep(0.02)
    return started


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_forwarded_and_ends_the_run(
    number: signal.Signals, code: int, stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path
) -> None:
    stub("tclip", f"trap 'echo saved > {tmp_path}/saved.$TCLIP_PROCESS_ID; exit 75' TERM" + TCLIP + "sleep 30 & wait")
    started = start(environ, tmp_path, 2)
    time.sleep(0.3)
    started.send_signal(number)
    assert started.wait(timeout=900) == code
    assert all((tmp_path / f"saved.{i}").exists() for i in range(2)) and count(tmp_path) == 1


def test_a_second_signal_kills_the_processes(stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path) -> None:
    stub("tclip", "trap '' TERM" + TCLIP + "while :; do sleep 0.1; done")
    started = start(environ, tmp_path, 2)
    started.send_signal(signal.SIGINT)
    time.sleep(1)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=900) == 130
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # children of the processes end a little later
            os.killpg(started.pid, 0)
            time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "two", "--", "train"], "--processes is 'two': it must be a whole number, at least 1"),
        (["-n", "0", "--", "train"], "--processes is '0': it must be a whole number, at least 1"),
        (["--restarts", "-1", "--", "train"], "--restarts is '-1': it must be a whole number, at least 0"),
        (["-n"], "--processes needs a value"),
        (["-n", "2"], "no command: end with -- train --config NAME --workdir DIR"),
        (["train"], "no option train: see --help; the command follows --"),
        (["--bogus", "--", "train"], "no option --bogus: see --help; the command follows --"),
    ],
)
def test_a_wrong_call_is_one_line(arguments: list[str], message: str, launch: Run) -> None:
    ran = launch("local", *arguments)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"launch/local: error: {message}\n")
