"""The other launchers: the commands that they print, and the ends of a job, with stubs for clouds and clusters."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

import tclip_jax
from tclip_jax.cli import main
from tclip_jax.shipping import WHEEL
from tests.launch.programs import GCLOUD, TCLIP

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCHERS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix == "")
GOLDEN = (pathlib.Path(__file__).parent / "dry_runs.txt").read_text()
CALLS = re.findall(r"^\$ launch/(.*)$", GOLDEN, re.MULTILINE)
Stub = Callable[[str, str], None]
Run = Callable[..., subprocess.CompletedProcess[str]]


def calls(tmp_path: pathlib.Path) -> str:
    """The calls that start or change something, of all programs."""
    return "".join(path.read_text() for path in sorted(tmp_path.glob("*.calls")))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("ready")
def test_a_dry_run_only_prints_commands(call: str, launch: Run, tmp_path: pathlib.Path) -> None:
    shutil.copy(ROOT / "configs" / "quickstart.py", tmp_path / "my own.py")
    (tmp_path / "shared").mkdir()
    name, *arguments = shlex.split(call)
    ran = launch(name, *arguments)
    known = {str(tmp_path): "HOME", str(ROOT): "TREE", tclip_jax.__version__: "VERSION"}
    printed = functools.reduce(lambda text, pair: text.replace(*pair), known.items(), ran.stdout)
    _, after = GOLDEN.split(f"$ launch/{call}\n")
    lines = (after.partition("\n$ ")[0].rstrip("\n") + "\n").splitlines(keepends=True)
    messages = [line for line in lines if line.startswith(f"launch/{name}: ")]
    assert (ran.returncode, printed) == (0, "".join(line for line in lines if line not in messages)), ran.stderr
    assert ran.stderr == "".join(messages) and calls(tmp_path) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("ready")
def test_every_launcher_has_a_dry_run_and_help_with_an_example(launch: Run) -> None:
    assert {call.split()[0] for call in CALLS} == set(LAUNCHERS)
    for name in LAUNCHERS:
        shown = launch(name, "--help").stdout
        assert f"\nusage: {name} " in shown and f"\nExample: {name} " in shown
        example = shown.partition("Example: ")[2].replace("\\\n", "")
        arguments = shlex.split(example)[1:]
        ran = launch(name, "--dry-run", *arguments)
        assert ran.returncode == 0, ran.stderr
        options = (ROOT / "launch" / name).read_text()
        for option in re.findall(r"--([a-z-]+)", re.search(r'^parse "(.*?)" *\\?\s*"(.*?)"', options, re.M)[0]):
            assert f"--{option}" in shown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("gke --name b16", "--cluster is needed: see --help"),
        ("tpu-vm --name b --zone z", "--accelerator-type is needed: see --help"),
        ("tpu-vm --name b --zone z --accelerator-type v9-8", "--runtime-version is needed: none is known for v9-8"),
        ("slurm --nodes many", "--nodes is 'many': it must be a whole number, at least 1"),
        ("skypilot", "--accelerators is needed: see --help"),
    ],
)
def test_a_missing_or_wrong_option_is_named(call: str, message: str, launch: Run) -> None:
    name, *arguments = call.split()
    ran = launch(name, *arguments, "--", "train")
    assert (ran.returncode, ran.stderr) == (2, f"launch/{name}: error: {message}\n")


OPTIONS = ["--name", "b", "--zone", "z", "--accelerator-type", "v6e-16"]
# Any command of which no option and no recipe is wrong.
COMMAND = ["evaluate", "gs://b/run", "--data", "digits"]
NOT_FOUND = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource"
    " 'projects/mine/locations/z/queuedResources/b' was not found"
)
TPU = f"""
{GCLOUD}
case $4 in
  create) echo WAITING_FOR_RESOURCES > state ;;
  describe)
    cat state 2> /dev/null || {{ echo "{NOT_FOUND}" >&2; exit 1; }}
    [ "$(cat state)" != WAITING_FOR_RESOURCES ] || echo ACTIVE > state ;;
  delete) rm state ;;
esac
"""


def actions(tmp_path: pathlib.Path) -> list[str]:
    """What gcloud was asked to do with the queued resource, in order."""
    return [line.split()[3] for line in (tmp_path / "gcloud.calls").read_text().splitlines()]


@pytest.mark.usefixtures("ready")
def test_tpu_vm_requests_a_preempted_tpu_again(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    """The first TPU is preempted in training, the second trains to the end."""
    stub("sleep", "")
    lost = '[ "$(grep -c " create " $CALLS)" -eq 2 ] || { echo SUSPENDED > state; exit 255; }'
    stub("gcloud", f"{TPU}\ncase $* in *tail*) {lost} ;; esac")
    ran = launch("tpu-vm", *OPTIONS, "--delete", "--", *COMMAND)
    assert ran.returncode == 0, ran.stderr
    once = ["describe", "create", "describe", "describe", "ssh", "scp", "ssh", "ssh", "ssh"]
    assert actions(tmp_path) == [*once, "describe", "describe", "delete", *once, "delete"]
    assert "launch/tpu-vm: b was preempted: requesting it again" in ran.stderr


@pytest.mark.usefixtures("ready")
def test_tpu_vm_requests_no_second_tpu_while_google_does_not_answer(
    launch: Run, stub: Stub, tmp_path: pathlib.Path
) -> None:
    stub("sleep", "")
    busy = "ERROR: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE: The service is currently unavailable."
    once = f'[ -e answered ] || {{ touch answered; echo "{busy}" >&2; exit 1; }}; echo ACTIVE'
    stub("gcloud", f"{GCLOUD}\ncase $4 in describe) {once} ;; esac")
    ran = launch("tpu-vm", *OPTIONS, "--", *COMMAND)
    assert ran.returncode == 0 and f"launch/tpu-vm: {busy}\n" in ran.stderr
    assert "create" not in actions(tmp_path) and actions(tmp_path)[:3] == ["describe", "describe", "ssh"]


@pytest.mark.usefixtures("ready")
def test_tpu_vm_returns_the_exit_code_of_the_command(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    stub("gcloud", f"{GCLOUD}\ncase $* in *describe*) echo ACTIVE ;; *tail*) exit 2 ;; esac")
    ran = launch("tpu-vm", *OPTIONS, "--", *COMMAND)
    assert ran.returncode == 2
    assert ran.stderr.endswith(
        "to delete the TPU: gcloud compute tpus queued-resources delete b --zone=z --force --quiet\n"
    )


@pytest.mark.usefixtures("ready")
def test_tpu_vm_ends_where_the_quota_is_exceeded(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    quota = (
        "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit"
        " 'TPUV6EPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone z."
    )
    stub("gcloud", f'{TPU.replace("create) ", f"""create) echo "{quota}" >&2; exit 1; """)}')
    ran = launch("tpu-vm", *OPTIONS, "--", *COMMAND)
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == quota
    assert actions(tmp_path) == ["describe", "create"]


@pytest.mark.usefixtures("ready")
def test_the_commands_on_a_host_of_tpu_vm(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    """The remote commands in a local shell: started once, followed to the end, with the exit code."""
    stub("tclip", f'{TCLIP}\necho "$@"; sleep 1; exit 42')
    host = '*curl*) ;; *" scp "*) cp "$5" "$6" b.files/ ;; *) eval "${!##--command=}" ;;'
    host = f"case $* in *describe*) echo ACTIVE ;; {host} esac"
    stub("gcloud", f"{GCLOUD}\n{host}")
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.py", tmp_path / "recipes" / "my own.py")
    command = ["train", "--config", "recipes/my own.py:teacher,runlocal", "--workdir", "gs://b/r"]
    ran = launch("tpu-vm", *OPTIONS, "--", *command)
    on_host = "launch local --restarts 3 -- train --config my own.py:teacher,runlocal --workdir gs://b/r\n"
    assert (ran.returncode, ran.stdout) == (42, on_host), ran.stderr
    assert (tmp_path / "my own.py").read_text() == (ROOT / "configs" / "quickstart.py").read_text()
    assert [path.name for path in (tmp_path / "b.files").glob("*.whl")] == [WHEEL]


@pytest.mark.usefixtures("ready")
def test_a_host_that_runs_the_command_keeps_its_package(
    launch: Run, stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path
) -> None:
    host = 'case $* in *describe*) echo ACTIVE ;; *" scp "*) ;; *tail*) exit 0 ;; *) eval "${!##--command=}" ;; esac'
    stub("gcloud", f"{GCLOUD}\n{host}")
    stub("curl", "touch $CALLS")
    with subprocess.Popen(["sleep", "60"]) as running:
        (tmp_path / "b.pid").write_text(str(running.pid))
        ran = launch("tpu-vm", *OPTIONS, "--", *COMMAND)
        running.kill()
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "curl.calls").exists() and not (tmp_path / "b.log").exists()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, False)])
@pytest.mark.usefixtures("ready")
def test_a_preempted_slurm_job_requeues_itself(
    code: int, requeued: bool, launch: Run, stub: Stub, environ: dict[str, str], tmp_path: pathlib.Path
) -> None:
    stub("srun", f'echo "$PYTHONPATH $@" > $CALLS; exit {code}')
    stub("scontrol", 'echo "$@" > $CALLS')
    ran = launch("slurm", "--nodes", "2", "--mounted", "a b", "--", "evaluate", "a b", "--data", "digits")
    assert ran.returncode == 0, ran.stderr
    job = ["bash", str(tmp_path / "job")]
    environ |= {"SLURM_JOB_ID": "7", "PYTHONPATH": "before"}
    assert subprocess.run(job, env=environ, timeout=900).returncode == code
    called = "--label tclip launch local --restarts 3 -- evaluate a b --data digits\n"
    options = "--cpus-per-task=8 --kill-on-bad-exit=0 --wait=120"
    folder = tmp_path / "tclip.code-20260101-000000"
    assert (tmp_path / "srun.calls").read_text() == f"{folder}:before {options} {called}"
    assert (tmp_path / "tclip.calls").read_text() == f"launch wheel --unpack --out {folder}\n" and folder.is_dir()
    assert (tmp_path / "scontrol.calls").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.calls").read_text() == "requeue 7\n"


@pytest.mark.usefixtures("ready")
def test_gke_builds_the_image_before_the_workload(launch: Run, tmp_path: pathlib.Path) -> None:
    options = ["--name", "b16", "--cluster", "pods", "--zone", "z", "--tpu-type", "v6e-16", "--image", "gcr.io/me/t"]
    ran = launch("gke", *options, "--", *COMMAND)
    assert ran.returncode == 0, ran.stderr
    built, pushed = (tmp_path / "docker.calls").read_text().splitlines()
    files = tmp_path / ".cache" / "tclip_jax" / "launch" / "b16"
    assert built.startswith("build ") and built.endswith(f"--file={ROOT}/launch/tclip.Dockerfile {files}")
    assert f"PACKAGE=/tclip/{WHEEL}[tpu,gcs]" in built and (files / WHEEL).is_file()
    assert pushed == "push gcr.io/me/t:b16"
    assert "--docker-image=gcr.io/me/t:b16 " in (tmp_path / "xpk.calls").read_text()


@pytest.mark.usefixtures("ready")
def test_gke_creates_no_workload_without_its_image(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    denied = (
        'denied: Permission "artifactregistry.repositories.uploadArtifacts" denied on resource'
        ' "projects/me/locations/us/repositories/gcr.io" (or it may not exist)'
    )
    stub("docker", f"[ $1 != push ] || {{ echo '{denied}' >&2; exit 1; }}")
    options = ["--name", "b16", "--cluster", "pods", "--zone", "z", "--tpu-type", "v6e-16", "--image", "gcr.io/me/t"]
    ran = launch("gke", *options, "--", *COMMAND)
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == denied
    assert not (tmp_path / "xpk.calls").exists()


@pytest.mark.usefixtures("ready")
def test_skypilot_sends_the_folder_that_it_made(launch: Run, tmp_path: pathlib.Path) -> None:
    shutil.copy(ROOT / "configs" / "quickstart.py", tmp_path / "own.py")
    ran = launch("skypilot", "--accelerators", "H100:8", "--", "train", "--config=own.py", "--workdir", "s3://b/r")
    assert ran.returncode == 0, ran.stderr
    task = yaml.safe_load((tmp_path / "sky.calls.yaml").read_text())
    files = tmp_path / ".cache" / "tclip_jax" / "launch" / "tclip"
    assert task["file_mounts"] == {"~/tclip-files": str(files)}
    assert {path.name for path in files.iterdir()} == {WHEEL, "own.py"}
    assert task["setup"].rstrip().endswith(f"'./{WHEEL}[cuda,s3]'")
    assert task["run"].rstrip().endswith("-- train --config=own.py --workdir s3://b/r")


def test_the_command_executes_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    executed: list[object] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: executed.append(call))
    command = ["-n", "2", "--help", "--", "train", "--config.steps=3", "--config", "x"]
    assert main(["launch", "local", *command]) == 0
    ((program, arguments, environ),) = executed
    assert (program, arguments[0], arguments[1]) == ("bash", "bash", str(ROOT / "launch" / "local"))
    assert arguments[2:] == command and environ["TCLIP_LAUNCH"] == str(ROOT / "launch")
    assert environ["PATH"].split(os.pathsep)[0] == str(pathlib.Path(sys.executable).parent)
    with pytest.raises(SystemExit):
        main(["launch", "moon"])
    assert f"choose from {', '.join(LAUNCHERS)}" in capsys.readouterr().err.replace("'", "")


def test_a_launcher_without_options_gets_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[tuple[str, list[str], object]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: executed.append(call))
    assert main(["launch", "local", "--", "params", "--config", "x"]) == 0
    assert executed[0][1][2:] == ["--", "params", "--config", "x"]


def test_a_launcher_of_your_own_is_a_path(environ: dict[str, str], tmp_path: pathlib.Path) -> None:
    script = """#!/usr/bin/env bash
# Runs a command.
#
# usage: my-launcher [--host HOST] -- COMMAND ...

source "$TCLIP_LAUNCH/common.sh"
parse "host" "" "$@"
"""
    (tmp_path / "my-launcher").write_text(script)

    def launched(*arguments: str) -> tuple[int, str]:
        call = [sys.executable, "-m", "tclip_jax", "launch", *arguments]
        ran = subprocess.run(call, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=900)
        return ran.returncode, ran.stdout + ran.stderr

    assert launched("./my-launcher", "--help") == (
        0,
        "Runs a command.\n\nusage: my-launcher [--host HOST] -- COMMAND ...\n",
    )
    message = "launch/my-launcher: error: no option --hots: see --help; the command follows --\n"
    assert launched("./my-launcher", "--hots=two", "--", "train") == (2, message)
    message = "tclip launch: error: none: no such launcher: write the path of a bash script\n"
    assert launched("./none", "--", "train") == (2, message)


def test_the_scripts_pass_shellcheck() -> None:
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install -e '.[test]')")
    scripts = [f"launch/{name}" for name in (*LAUNCHERS, "common.sh")]
    checked = subprocess.run([program, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert checked.returncode == 0, checked.stdout
