"""A run whose data, checkpoints and artifact are in a bucket, which is slow, unavailable, or cuts answers off."""

from __future__ import annotations

import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from tclip_jax.inference.load import load_run
from tests.gcs_server import Bucket, serving
from tests.tars import write_tar

pytest.importorskip("gcsfs", reason="gcsfs is not installed (pip install -e '.[test]')")
pytestmark = pytest.mark.faults
HERE = pathlib.Path(__file__).parent
ONE_DEVICE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "OPENBLAS_NUM_THREADS": "1",
}
Tclip = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    """gs://bucket with a tar of sixteen samples."""
    with serving() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rng, members = np.random.default_rng(0), []
    for i in range(16):
        data = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(data, "PNG")
        members += [(f"{i:04}.png", data.getvalue()), (f"{i:04}.txt", f"sample {i}".encode())]
    path = tmp_path_factory.mktemp("data") / "0.tar"
    write_tar(path, members)
    return path


@pytest.fixture(scope="module")
def undisturbed(tar: pathlib.Path, cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same run on a local disk."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, str(HERE / "child.py"), "", *train(f"wds:{tar}", str(workdir))]
    subprocess.run(
        command, env=os.environ | ONE_DEVICE | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, check=True, timeout=500
    )
    return workdir


@pytest.fixture
def tclip(bucket: Bucket, cache: pathlib.Path) -> Iterator[Tclip]:
    """Starts a command of tclip that finds the bucket."""
    children: list[subprocess.Popen[str]] = []
    environment = os.environ | bucket.environ | ONE_DEVICE | {"JAX_COMPILATION_CACHE_DIR": str(cache)}

    def start(fault: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "child.py"), fault, *arguments]
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def train(data: str, workdir: str) -> list[str]:
    recipe = ["--config", str(HERE / "recipe.py"), "--config.steps=6", "--config.checkpoint.every=2"]
    return ["train", *recipe, f"--config.data.source={data}", f"--workdir={workdir}"]


def finish(child: subprocess.Popen[str]) -> str:
    """What the command prints, which must succeed."""
    out, error = child.communicate(timeout=500)
    assert child.returncode == 0, error
    return out


def copied(bucket: Bucket, name: str, folder: pathlib.Path) -> pathlib.Path:
    """A folder of the bucket as a local one."""
    for path, blob in bucket.blobs.items():
        if path.startswith(f"{name}/"):
            local = folder / path
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(blob.data)
    return folder / name


def assert_same_params(one: pathlib.Path, other: pathlib.Path) -> None:
    params = (jax.device_get(load_run(run)[1].params) for run in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *params)


def test_a_run_in_a_bucket_is_killed_resumed_and_packed(
    bucket: Bucket, tclip: Tclip, tar: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bucket.put("data/0.tar", tar.read_bytes())
    command = train("wds:gs://bucket/data/*.tar", "gs://bucket/run")
    child = tclip("slow=1", *command)
    deadline = time.monotonic() + 600
    while "run/checkpoints/2/commit_success.txt" not in bucket.blobs:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert not any(name.startswith("run/checkpoints/6/") for name in bucket.blobs)
    written: list[str] = []
    bucket.fault = lambda operation, name: written.append(name) or "" if operation == "write" else ""
    finish(tclip("", *command))
    # It resumed: nothing of that checkpoint was written again.
    assert any(name.startswith("run/checkpoints/6/") for name in written)
    assert not any(name.startswith("run/checkpoints/2/") for name in written)
    lines = [json.loads(line) for line in bucket.blobs["run/metrics.jsonl"].data.decode().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert_same_params(copied(bucket, "run", tmp_path / "copy"), undisturbed)
    finish(tclip("", "pack", "gs://bucket/run", "--out", "gs://bucket/artifact"))
    finish(tclip("", "verify", "gs://bucket/artifact", "gs://bucket/run"))
    assert {"artifact/tclip.json", "artifact/ternary.safetensors"} <= set(bucket.blobs)


def test_a_bad_connection_changes_nothing(
    bucket: Bucket, tclip: Tclip, tar: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Any request may be answered late or with an error, and any read may be cut off; a seed draws which."""
    bucket.put("data/0.tar", tar.read_bytes())
    rng = random.Random(0)

    def fault(operation: str, name: str) -> str:
        drawn = rng.choices(["", "slow", "503", "truncate"], [80, 6, 4, 10])[0]
        return "" if drawn == "truncate" and operation != "read" else drawn

    bucket.fault = fault
    finish(tclip("", *train("wds:gs://bucket/data/*.tar", "gs://bucket/run")))
    assert min(bucket.counts[each] for each in ("slow", "503", "truncate")) > 5, bucket.counts
    bucket.fault = lambda operation, name: ""
    assert_same_params(copied(bucket, "run", tmp_path / "copy"), undisturbed)


def test_rights_that_are_lost_end_the_run_and_leave_its_last_checkpoint(
    bucket: Bucket, tclip: Tclip, tar: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = train(f"wds:{tar}", "gs://bucket/run")
    bucket.fault = lambda operation, name: "403" * (operation == "write" and "run/checkpoints/4" in name)
    child = tclip("", *command)
    _, error = child.communicate(timeout=500)
    assert child.returncode == 2 and bucket.counts["403"]
    # TensorStore prints tracebacks of its own threads beside it.
    (line,) = re.findall(r"^tclip train: (.*)$", error, re.MULTILINE)
    unwritten = "error: gs://bucket/run/checkpoints/4: the checkpoint could not be written; step 2 is whole: "
    assert line.startswith(unwritten) and "storage.objects.create access" in line and len(line) < 450, error
    assert "run/checkpoints/2/commit_success.txt" in bucket.blobs
    assert "run/checkpoints/4/commit_success.txt" not in bucket.blobs
    bucket.fault = lambda operation, name: ""
    finish(tclip("", *command))
    assert_same_params(copied(bucket, "run", tmp_path / "copy"), undisturbed)
