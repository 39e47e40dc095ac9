"""What the launchers find missing before anything is paid, with the texts and exit codes of the real programs."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

from tests.launch.programs import GCLOUD, READY

Stub = Callable[[str, str], None]
Run = Callable[..., subprocess.CompletedProcess[str]]

CALLS = {
    "tpu-vm": "--name b --zone z --accelerator-type v6e-16",
    "gke": "--name b --cluster pods --zone z --tpu-type v6e-16 --image gcr.io/me/t",
    "skypilot": "--accelerators H100:8 --infra gcp/us-central1",
    "slurm": "--nodes 2",
}
NO_ACCOUNT = """You do not currently have an active account selected.
Please run:

  $ gcloud auth login

to obtain new credentials.
"""
NO_BUCKET = "ERROR: (gcloud.storage.ls) gs://b not found: 404."
NO_TYPE = (
    "ERROR: (gcloud.compute.tpus.accelerator-types.describe) NOT_FOUND: Resource"
    " 'projects/mine/locations/z/acceleratorTypes/v6e-16' was not found"
)
NO_IMAGE = (
    "ERROR: (gcloud.container.images.describe) [gcr.io/me/t] is not found or is not a valid name. Expected tag in the"
    ' form "base:tag" or "tag" or digest in the form "sha256:<digest>"'
)
NO_DAEMON = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
NO_SKY = """Checking credentials to enable infra for SkyPilot.
  GCP: disabled
    Reason [compute, storage]: GCP tools are not installed. Run the following commands:
      $ pip install google-api-python-client

🎉 Enabled infra 🎉
  No infra to check/enabled."""


def failing(calls: str, text: str, code: int = 1) -> str:
    """gcloud that fails for calls that match a pattern of bash, and else answers as if nothing were missing."""
    return f"case $* in {calls}) cat >&2 <<'END'\n{text}\nEND\nexit {code} ;; esac\n{GCLOUD}"


# launcher, options, program, its text, what is missing
CASES = [
    ("tpu-vm", "", "gcloud", None, "gcloud: install it from https://cloud.google.com/sdk/docs/install"),
    ("tpu-vm", "", "gcloud", "case $* in 'auth list'*) echo 'WARNING: no keys' >&2; exit ;; esac; echo '" + NO_ACCOUNT
     + "' >&2; exit 1", "a Google account: gcloud auth login"),
    ("tpu-vm", "", "gcloud", f"case $* in *project) echo '(unset)' >&2; exit ;; esac\n{GCLOUD}",
     "a project: gcloud config set project PROJECT"),
    ("tpu-vm", "", "gcloud", failing("'storage ls'*", NO_BUCKET), f"gs://b: {NO_BUCKET}"),
    ("tpu-vm", "", "gcloud", failing("*accelerator-types*", NO_TYPE), f"v6e-16 in z: {NO_TYPE}"),
    ("tpu-vm", "", "ssh-add", "echo 'The agent has no identities.'; exit 1",
     "an SSH key: ssh-add ~/.ssh/google_compute_engine"),
    ("tpu-vm", "", "ssh-add", "echo 'Could not open a connection to your authentication agent.' >&2; exit 2",
     "an SSH key: ssh-add ~/.ssh/google_compute_engine"),
    ("gke", "", "xpk", None, "xpk: pip install xpk"),
    ("gke", "", "docker", f"echo; echo '{NO_DAEMON}' >&2; exit 1", f"docker: {NO_DAEMON}"),
    ("gke", "", "gcloud", f"case $* in 'container clusters list'*) exit ;; esac\n{GCLOUD}",
     "cluster pods: no cluster has that name"),
    ("gke", "--built", "gcloud", failing("'container images'*", NO_IMAGE), f"image gcr.io/me/t: {NO_IMAGE}"),
    ("skypilot", "", "sky", None, "sky: pip install 'skypilot[gcp]', or another cloud in place of gcp"),
    ("skypilot", "", "sky", f"cat <<'END'\n{NO_SKY}\nEND", "a cloud: sky check gcp"),
    ("slurm", "", "sbatch", None, "sbatch: run this on a login node of the cluster"),
    ("slurm", "", "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2\n"
     "echo 'allocation failure: Invalid partition name specified' >&2; exit 1",
     "sbatch: sbatch: error: invalid partition specified: gpu"),
]  # fmt: skip


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("launcher", "options", "program", "text", "missing"), CASES, ids=[f"{case[0]}-{case[4][:20]}" for case in CASES]
)
def test_what_is_missing_is_listed_and_nothing_is_started(
    launcher: str,
    options: str,
    program: str,
    text: str | None,
    missing: str,
    launch: Run,
    stub: Stub,
    environ: dict[str, str],
    tmp_path: pathlib.Path,
) -> None:
    checked = "wheel=w.whl\nrecipe=\nextras=gcs\nbuckets=(gs://b)\ncommand=(evaluate gs://b/run)"
    stub("tclip", f"[ \"$1 $2\" = 'launch check' ] || exit 1\necho '{checked}'")
    if text is None:
        (tmp_path / "bin" / program).unlink()
        # Only what the scripts need else, so that the program of this machine is not found.
        for name in ("bash", "cat", "cp", "dirname", "grep", "mkdir", "mktemp", "rm"):
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
        environ["PATH"] = f"{tmp_path}/bin"
    else:
        stub(program, text)
    arguments = [*CALLS[launcher].split(), *options.split(), "--", "evaluate", "gs://b/run"]
    dry = launch(launcher, "--dry-run", *arguments)
    lines = [line for line in dry.stderr.splitlines() if "missing" in line]
    assert lines == [f"launch/{launcher}: missing: {missing}", f"launch/{launcher}: dry run: 1 missing"], dry.stderr
    assert dry.returncode == 1 and "tclip" in dry.stdout and dry.stdout.startswith("+ ")
    real = launch(launcher, *arguments)
    assert (real.returncode, real.stdout) == (2, "")
    assert real.stderr.splitlines()[-2:] == [lines[0], f"launch/{launcher}: error: nothing was started: 1 missing"]
    assert not list(tmp_path.glob("*.calls"))


@pytest.mark.usefixtures("ready")
def test_a_bucket_that_only_the_hosts_may_read_is_no_obstacle(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    text = (
        "ERROR: (gcloud.storage.ls) [me@example.com] does not have permission to access b instance [b] (or it may not"
        " exist): me@example.com does not have storage.objects.list access to the Google Cloud Storage bucket."
    )
    stub("gcloud", failing("'storage ls'*", text))
    ran = launch("tpu-vm", *CALLS["tpu-vm"].split(), "--dry-run", "--", "evaluate", "gs://b/run", "--data", "digits")
    assert ran.returncode == 0
    assert f"launch/tpu-vm: note: hosts need more rights than this account has: {text}\n" in ran.stderr


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("launcher", ["tpu-vm", "gke", "skypilot"])
@pytest.mark.parametrize("dry", [("--dry-run",), ()])
def test_data_that_no_host_has_is_refused_before_anything_is_asked(
    launcher: str, dry: tuple[str, ...], launch: Run, stub: Stub, tmp_path: pathlib.Path
) -> None:
    for name in READY:
        stub(name, "touch $CALLS; exit 1")
    command = ["train", "--config", "ternaryclip:Q-ALL", "--workdir", "gs://b/run"]
    ran = launch(launcher, *CALLS[launcher].split(), *dry, "--", *command)
    assert (ran.returncode, ran.stdout) == (2, "") and not list(tmp_path.glob("*.calls"))
    assert ran.stderr == (
        "tclip launch check: error: config.data.source is 'folder:data/cc12m': hosts of a cloud do not have data/cc12m;"
        " write a URL that the hosts read, such as wds:gs://BUCKET/cc12m/*.tar, or give --mounted a mount\n"
    )


@pytest.mark.usefixtures("ready")
def test_an_image_that_exists_has_no_recipe_file(launch: Run, tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.py").write_text("from tclip_jax.runs.config import base_config as get_config\n")
    ran = launch("gke", *CALLS["gke"].split(), "--built", "--", "train", "--config", "own.py", "--workdir", "gs://b/r")
    message = f"hosts do not have {tmp_path}/own.py; leave out --built to build an image with it"
    assert (ran.returncode, ran.stderr) == (2, f"launch/gke: error: --built: {message}\n")


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "../b"], "--name is '../b': it must be letters, digits, '.', '_' and '-'"),
        (["--package", "dist/none.whl"], "nothing was started: --package names no file"),
    ],
)
def test_a_wrong_option_ends_before_the_start(
    options: list[str], message: str, launch: Run, tmp_path: pathlib.Path
) -> None:
    ran = launch("tpu-vm", *CALLS["tpu-vm"].split(), *options, "--", "evaluate", "gs://b/run", "--data", "digits")
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (2, f"launch/tpu-vm: error: {message}")
    assert not (tmp_path / "gcloud.calls").exists()


@pytest.mark.usefixtures("ready")
def test_without_a_wheel_nothing_is_started(launch: Run, stub: Stub, tmp_path: pathlib.Path) -> None:
    stub("tclip", "[ $2 != wheel ] || exit 2\necho 'wheel=w.whl; command=(evaluate)'")
    ran = launch("tpu-vm", *CALLS["tpu-vm"].split(), "--", "evaluate", "gs://b/run", "--data", "digits")
    message = "nothing was started: there is no wheel of this installation"
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (2, f"launch/tpu-vm: error: {message}")
    assert not (tmp_path / "gcloud.calls").exists()
