"""Eight simulated devices for every test, this tree for every child process, and what open_clip needs beside torch."""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import hypothesis
import pytest
from absl import flags
from etils.epath import backend

from tests.object_store import Bucket

# Child processes import this tree, whatever is installed.
ROOT = str(pathlib.Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# A first example compiles, so there is no deadline; CI draws the same examples every time.
hypothesis.settings.register_profile("tclip", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tclip")
# Compiled programs are kept and many: going through all of them time and again would be a tenth of the time.
gc.set_threshold(100_000, 50, 100)
flags.FLAGS.mark_as_parsed()  # Grain's worker processes refuse to start otherwise

if importlib.util.find_spec("torch"):
    import torch

    # torchvision's wheel is a CUDA build and registers no `nms` beside a CPU torch, which it needs to be imported.
    if torch.version.cuda is None:
        torchvision_library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            torchvision_library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs PyTorch where it is not installed."""
    if not importlib.util.find_spec("torch"):
        for item in items:
            if item.get_closest_marker("torch"):
                item.add_marker(pytest.mark.skip(reason="PyTorch is not installed (pip install -e '.[test]')"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real images that are never committed."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("TCLIP_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real images: neither TCLIP_TEST_DATA nor ../shared/data is a folder")
    return folder


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    """gs://bucket, empty."""
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = ["", "/bucket"]
    monkeypatch.setattr(Bucket, "failing", staticmethod(lambda operation, path: None))
    monkeypatch.setattr(type(backend.fsspec_backend), "_get_filesystem", lambda self, name: Bucket())
    yield Bucket
    Bucket.store.clear()
