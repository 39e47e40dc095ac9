"""The encoder against the plain model: padding, shapes, devices, and two processes."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
import types
from collections.abc import Iterator

import jax
import numpy as np
import numpy.typing as npt
import pytest

from tclip_jax.data.images import Preprocess, normalize
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.parallel.mesh import make_mesh

VISION = VisionConfig((16, 16), patch_size=8, width=16, layers=1, head_width=8)
CONFIG = CLIPConfig(8, VISION, TextConfig(context_length=40, width=8, heads=1, layers=1))
LONG = "a photo of a very " + "very " * 50 + "long caption"
TEXTS = ["a cat", LONG, "", "a photo of a dog " * 5, "frog"]


def model(config: CLIPConfig = CONFIG) -> Model:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config))
    return Model(config, Preprocess(16), params)


def pixels(rows: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (rows, 16, 16, 3), np.uint8)


@pytest.fixture(autouse=True)
def fast_compilation() -> Iterator[None]:
    """Disable optimizations: these tests spend nearly all their time compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_batch_size_is_a_multiple_of_the_devices() -> None:
    sizes = [Encoder(model(), batch_size=rows).batch_size for rows in (1, 8, 9, 128)]
    assert sizes == [8, 8, 16, 128] and jax.device_count() == 8


def test_embeddings_equal_the_plain_model() -> None:
    plain, encoder = model(), Encoder(model(), batch_size=5)
    images = pixels(8)
    expected = plain.encode_image(normalize(images, plain.preprocess.mean, plain.preprocess.std))
    np.testing.assert_allclose(encoder.images(images), expected, atol=1e-6)
    for count in (1, 5):
        texts = (TEXTS * 4)[-count:] + TEXTS * (count - 1)
        np.testing.assert_allclose(encoder.texts(texts), plain.encode_text(texts), atol=1e-6)


def test_short_texts_are_encoded_at_a_short_length(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    run = Encoder._run

    def watched(self: Encoder, *arguments: object, batch: npt.NDArray[np.int32]) -> jax.Array:
        shapes.append(batch.shape)
        return run(self, *arguments, batch=batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "_run", watched)
    Encoder(model(), batch_size=8).texts(["frog"] * 8 + [LONG] + ["frog"] * 8)
    assert shapes == [(8, 16), (8, 16), (8, 40)]


def test_texts_keep_their_padding_without_a_causal_mask() -> None:
    text = TextConfig(context_length=40, width=8, heads=1, layers=1, no_causal_mask=True)
    plain = model(CLIPConfig(8, VISION, text))
    np.testing.assert_allclose(Encoder(plain).texts(TEXTS), plain.encode_text(TEXTS), atol=1e-6)


def test_every_mesh_and_dtype() -> None:
    images = pixels(8)
    expected = np.asarray(Encoder(model(), batch_size=8, mesh=make_mesh(devices=jax.devices()[:1])).images(images))
    sharded = Encoder(model(), batch_size=8, mesh=make_mesh(2, 4))
    np.testing.assert_allclose(sharded.images(images), expected, atol=1e-6)
    half = np.asarray(Encoder(model(), batch_size=8, dtype="bfloat16").images(images))
    assert half.dtype == np.float32 and 1e-5 < abs(half - expected).max() < 0.05


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 0: it must be 1 or more"):
        Encoder(model(), batch_size=0)
    small = CLIPConfig(8, VISION, TextConfig(context_length=8, vocab_size=100, width=8, heads=1, layers=1))
    with pytest.raises(ValueError, match="the model's vocabulary has 100 tokens, but the tokenizer has 49408"):
        Encoder(model(small))


PROCESS = """
import os, sys
index, port, root, out = int(sys.argv[1]), *sys.argv[2:]
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
if port != "0":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
import dataclasses
import numpy as np
from tclip_jax.inference.model import fingerprint
from tclip_jax.inference.model import Model
from tclip_jax.data.images import Preprocess
from tclip_jax.evaluation.encoder import Encoder
from tclip_jax.evaluation.runner import evaluate
from tclip_jax.evaluation.tasks import suite_tasks
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
vision = VisionConfig((16, 16), patch_size=8, width=16, layers=1, head_width=8)
config = CLIPConfig(8, vision, TextConfig(context_length=16, width=8, heads=1, layers=1))
rng = np.random.default_rng(0)
params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config))
model = Model(config, Preprocess(16), params)
tasks = suite_tasks(root, "vtab/cifar10,voc2007_multilabel,flickr8k,mnist")
report = evaluate(Encoder(model, batch_size=8), tasks, model="m", weights=fingerprint(model, root), out=out)
assert set(report.errors) == {"mnist"} and len(report.results) == 3
"""


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(exports: types.SimpleNamespace, tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    labels = [int(label) for label in rng.integers(0, 10, 29)]  # the last batch has five rows of eight
    write = exports.write
    write(tmp_path / "wds_vtab-cifar10", labels, [f"c{i}" for i in range(10)], images={3: b"no image", 28: b""})
    write(tmp_path / "wds_voc2007_multilabel", [*rng.integers(0, 2, (9, 20))], [f"c{i}" for i in range(20)])
    write(tmp_path / "wds_flickr8k", [[f"é {i}", f"b {i}"][: 1 + i % 2] for i in range(17)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "flickr8k.json").write_text("{}")  # the output folder of process 1, which is never read
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, *arguments, tmp_path, tmp_path / out], stderr=subprocess.PIPE, text=True)
        for arguments, out in ((["0", port], "two"), (["1", port], "other"), (["0", "0"], "one"))
    ]
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-2000:]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )
    for name in ("vtab-cifar10", "voc2007_multilabel", "flickr8k"):
        one, two = (json.loads((tmp_path / out / f"{name}.json").read_text()) for out in ("one", "two"))
        for key in ("metrics", "samples", "failed", "pretrained"):
            assert one[key] == two[key]
        with (
            np.load(tmp_path / "one" / f"{name}.predictions.npz") as a,
            np.load(tmp_path / "two" / f"{name}.predictions.npz") as b,
        ):
            assert a.files == b.files
            for key in a.files:
                if key == "scores":
                    np.testing.assert_allclose(a[key], b[key], atol=1e-4)
                else:
                    np.testing.assert_array_equal(a[key], b[key])
