"""The other launchers: the commands they print, and the ways a job can end, with stand-ins for clouds and clusters."""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from tclip_jax.cli import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHERS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix == "")
GOLDEN = (pathlib.Path(__file__).parent / "dry_runs.txt").read_text()
CALLS = re.findall(r"^\$ launch/(.*)$", GOLDEN, re.MULTILINE)
Stub = Callable[[str, str], None]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("call", CALLS)
def test_a_dry_run_prints_the_commands_and_runs_none(call: str, launch: Run, stub: Stub) -> None:
    for program in ("gcloud", "xpk", "sbatch", "sky", "tclip"):
        stub(program, "exit 1")
    name, *arguments = shlex.split(call)
    ran = launch(name, *arguments)
    _, after = GOLDEN.split(f"$ launch/{call}\n")
    lines = (after.partition("\n$ ")[0].rstrip("\n") + "\n").splitlines(keepends=True)
    said = [line for line in lines if line.startswith(f"launch/{name}: ")]
    assert (ran.returncode, ran.stdout) == (0, "".join(line for line in lines if line not in said))
    assert ran.stderr == "".join(said), "what is not a command"


def test_every_launcher_has_a_dry_run_and_help_with_an_example(launch: Run) -> None:
    assert {call.split()[0] for call in CALLS} == set(LAUNCHERS)
    for name in LAUNCHERS:
        shown = launch(name, "--help").stdout
        assert f"\nusage: {name} " in shown and f"\nExample: {name} " in shown
        example = shown.partition("Example: ")[2].replace("\\\n", "")
        arguments = shlex.split(example)[1:]
        assert launch(name, "--dry-run", *arguments).returncode == 0
        options = (ROOT / "launch" / name).read_text()
        for option in re.findall(r"--([a-z-]+)", re.search(r'^parse "(.*?)" *\\?\s*"(.*?)"', options, re.M)[0]):
            assert f"--{option}" in shown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("gke --name b16", "--cluster is required: see --help"),
        ("tpu-vm --name b --zone z", "--accelerator-type is required: see --help"),
        ("tpu-vm --name b --zone z --accelerator-type v9-8", "--runtime-version is required: v9-8 has no default"),
        ("slurm --nodes many", "--nodes is 'many': it must be an integer, at least 1"),
        ("skypilot", "--accelerators is required: see --help"),
    ],
)
def test_what_is_missing_is_said(call: str, message: str, launch: Run) -> None:
    name, *arguments = call.split()
    ran = launch(name, *arguments, "--", "train")
    assert (ran.returncode, ran.stderr) == (2, f"launch/{name}: error: {message}\n")


def test_tpu_vm_asks_again_for_what_was_taken_away(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    """The first TPU is lost while it trains, the second trains to the end."""
    stub("sleep", "")
    stub(
        "gcloud",
        """
        echo "$4 ${*: -1}" >> $CALLS
        case $4 in
          create) echo WAITING_FOR_RESOURCES > state ;;
          describe) cat state 2> /dev/null; [ "$(cat state)" != WAITING_FOR_RESOURCES ] || echo ACTIVE > state ;;
          delete) rm state ;;
          ssh) case $* in
            *tail*) [ "$(grep -c create $CALLS)" -eq 2 ] || { echo SUSPENDED > state; exit 255; } ;;
          esac ;;
        esac
        """,
    )
    options = ["--name", "b", "--zone", "z", "--accelerator-type", "v6e-16", "--delete"]
    ran = launch("tpu-vm", *options, "--", "train", "--workdir", "gs://b/r")
    assert ran.returncode == 0, ran.stderr
    did = [line.split()[0] for line in (tmp_path / "gcloud.calls").read_text().splitlines()]
    once = ["describe", "create", "describe", "describe", "ssh", "ssh", "ssh"]
    assert did == [*once, "describe", "describe", "delete", *once, "delete"]
    assert "launch/tpu-vm: b was lost: requesting it again" in ran.stderr


def test_tpu_vm_ends_with_the_code_of_what_it_ran(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    stub("gcloud", "case $* in *describe*) echo ACTIVE ;; *tail*) exit 2 ;; esac")
    ran = launch("tpu-vm", "--name", "b", "--zone", "z", "--accelerator-type", "v6e-16", "--", "train")
    assert ran.returncode == 2
    assert ran.stderr.endswith(
        "to delete the TPU: gcloud compute tpus queued-resources delete b --zone=z --force --quiet\n"
    )


def test_what_a_host_of_tpu_vm_runs(launch: Run, stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path) -> None:
    """The remote commands, in a shell of this machine: begun once, followed to the end, with its code."""
    stub("tclip", 'echo "$@"; sleep 1; exit 42')
    stub("gcloud", 'case $* in *describe*) echo ACTIVE ;; *curl*) ;; *) eval "${!##--command=}" ;; esac')
    options = ["--name", "b", "--zone", "z", "--accelerator-type", "v6e-16"]
    ran = launch("tpu-vm", *options, "--", "train", "--config.x=a 'b'")
    assert (ran.returncode, ran.stdout) == (42, "launch local --restarts 3 -- train --config.x=a 'b'\n"), ran.stderr


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
def test_a_slurm_job_goes_back_into_the_queue_when_it_was_preempted(
    code: int, requeued: bool, launch: Run, stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path
) -> None:
    stub("sbatch", "cat > job")
    stub("srun", f'echo "$@" > $CALLS; exit {code}')
    stub("scontrol", 'echo "$@" > $CALLS')
    assert launch("slurm", "--nodes", "2", "--", "train", "--workdir", "a b").returncode == 0
    job = ["bash", str(tmp_path / "job")]
    assert subprocess.run(job, env=environ | {"SLURM_JOB_ID": "7"}, timeout=20).returncode == code
    called = "--label tclip launch local --restarts 3 -- train --workdir a b\n"
    assert (tmp_path / "srun.calls").read_text() == f"--cpus-per-task=8 --kill-on-bad-exit=0 --wait=120 {called}"
    assert (tmp_path / "scontrol.calls").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.calls").read_text() == "requeue 7\n"


def test_the_command_becomes_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    became: list[object] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: became.append(call))
    assert main(["launch", "local", "-n", "2", "--help", "--", "train", "--config.steps=3", "--config", "x"]) == 0
    ((program, arguments, environ),) = became
    assert (program, arguments[0], arguments[1]) == ("bash", "bash", str(ROOT / "launch" / "local"))
    assert arguments[2:] == ["-n", "2", "--help", "--", "train", "--config.steps=3", "--config", "x"]
    assert environ["PATH"].split(os.pathsep)[0] == str(pathlib.Path(sys.executable).parent)
    with pytest.raises(SystemExit):
        main(["launch", "moon"])
    assert f"choose from {', '.join(LAUNCHERS)}" in capsys.readouterr().err.replace("'", "")


def test_the_scripts_pass_shellcheck() -> None:
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install -e '.[test]')")
    scripts = [f"launch/{name}" for name in (*LAUNCHERS, "common.sh")]
    checked = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout
