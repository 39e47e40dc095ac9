"""Eight simulated devices for every test, this tree for every child process, what open_clip needs beside torch and
what tests of several folders share: a small run, tars with faults, a bucket."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices share few cores with other processes: 40 seconds without all of them in a collective is no deadlock.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
)

import hypothesis
import jax
import ml_collections
import numpy as np
import pytest
from absl import flags
from etils.epath import backend
from PIL import Image

from tclip_jax.artifacts import pack_params
from tclip_jax.data.images import Preprocess
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ATTENTION, MLP, TOKEN_EMBEDDING, TernaryRules
from tclip_jax.runs.config import base_config
from tclip_jax.ternary import Quantizer
from tests.object_store import Bucket
from tests.tars import write_tar

# Child processes import this tree, whatever is installed.
ROOT = str(pathlib.Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

# A first example compiles, so there is no deadline; CI draws the same examples every time.
hypothesis.settings.register_profile("tclip", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("tclip")
# Compiled programs are kept and many: going through all of them time and again would be a tenth of the time.
gc.set_threshold(100_000, 50, 100)
# Tests of many files compile the same small programs. Each process has its folder: others might read half a file.
COMPILED = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
flags.FLAGS.mark_as_parsed()  # Grain's worker processes refuse to start otherwise

if importlib.util.find_spec("torch"):
    import torch

    # torchvision's wheel is a CUDA build and registers no `nms` beside a CPU torch, which it needs to be imported.
    if torch.version.cuda is None:
        torchvision_library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            torchvision_library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class FailuresAtOnce:
    """Names each failed test as it fails, so that a run that is cut off before its summary says what failed."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            error = getattr(report.longrepr, "reprcrash", None) or report.longreprtext
            self.terminal.write_line(f"\nFAILED {report.nodeid}: {error}"[:2000])


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """Ends the run when a test ends its process: xdist would wait forever for the rest of that process's files."""
    pytest.exit(f"{crashitem} ended its process", returncode=1)


@pytest.hookimpl(trylast=True)  # after pytest's own, which makes the reporter
def pytest_configure(config: pytest.Config) -> None:
    """Names failures at once where no one looks on."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal and "CI" in os.environ:
        config.pluginmanager.register(FailuresAtOnce(terminal))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs PyTorch where it is not installed."""
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


def encode(seed: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Indices and copies of one test are not found by another."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TCLIP_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def jpeg() -> Callable[[int], bytes]:
    """The image of noise of a seed."""
    return encode


@pytest.fixture
def tars(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four shards: three good samples; two good and two bad; two good ones and one that is cut off; nothing."""
    folder = tmp_path / "tars"
    folder.mkdir()
    shards: list[list[tuple[str, bytes]]] = [
        [(f"00000{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", encode(i)), ("txt", b"a dog"))],
        [
            *(("000010.jpg", encode(10)), ("000010.txt", "ein Café\nand a line".encode())),
            *(("000011.jpg", encode(11)[:400]), ("000011.txt", b"cut")),
            *(("000012.jpg", encode(12)), ("000012.json", b"{}")),
            *(("000013.jpg", encode(0)), ("000013.txt", b"the first again " * 40)),
        ],
        [(f"00002{i}.{suffix}", data) for i in range(3) for suffix, data in (("jpg", encode(20 + i)), ("txt", b"cat"))],
    ]
    for number, members in enumerate(shards):
        write_tar(folder / f"{number:05}.tar", members)
    whole = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(whole[: whole.index(b"000022.jpg") + 700])
    (folder / "00003.tar").write_bytes(b"")
    return folder


@pytest.fixture
def fast_compilation() -> Iterator[None]:
    """Compiling is most of the time of tests that train, half of it optimizing what then runs for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    """Digits, one layer of width 16 in each tower, eight steps of eight images."""
    config = base_config()
    config.model.embed_dim = 16
    config.model.vision_cfg.update({"image_size": 16, "width": 16, "layers": 1, "head_width": 8})
    config.model.text_cfg.update({"context_length": 12, "width": 16, "layers": 1})
    config.data.batch_size = 8
    config.steps = 8
    config.checkpoint.every = 3
    config.loss.positives = "equal_text"
    return config


@pytest.fixture(scope="session")
def model_config() -> CLIPConfig:
    vision = VisionConfig(image_size=(16, 16), patch_size=8, width=24, layers=2, head_width=12)
    return CLIPConfig(8, vision, TextConfig(context_length=6, vocab_size=50, width=16, heads=2, layers=1))


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(16)


@pytest.fixture(scope="session")
def rules() -> TernaryRules:
    return (
        (MLP, Quantizer(group=20)),  # neither width is a multiple: the last groups are short
        (ATTENTION, Quantizer(group="channel", scale_bits=11)),
        (TOKEN_EMBEDDING, Quantizer(group="tensor", scale_bits=24)),
    )


@pytest.fixture(scope="session")
def latent(model_config: CLIPConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(model_config))


@pytest.fixture(scope="session")
def packed(latent: dict[str, Any], rules: TernaryRules) -> dict[str, Any]:
    return pack_params(latent, rules)
