"""A killed `tclip embed` or `tclip search index` resumes with its partial work."""

from __future__ import annotations

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tclip_jax.cli import main
from tclip_jax.inference.inputs import find_images
from tclip_jax.inference.model import Model

COUNT = 400


@pytest.mark.faults
@pytest.mark.parametrize("command", ["embed", "index"])
def test_a_killed_command_is_resumed(
    command: str,
    artifact: pathlib.Path,
    pictures: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = (pictures / "0.png").read_bytes()
    folder, out = tmp_path / "many", tmp_path / "out.npy"
    folder.mkdir()
    for i in range(COUNT):
        (folder / f"{i:03d}.png").write_bytes(picture)
    arguments = ["embed", str(artifact), "--images", str(folder)]
    if command == "index":
        arguments = ["search", "index", str(artifact), str(folder)]
    arguments += ["--out", str(out), "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "tclip_jax", *arguments], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.npy.partial"
    while len(list(partial.glob("*.npz"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(list(partial.glob("*.npz")))
    assert 5 <= done < COUNT and not out.exists()

    encoded: list[int] = []
    original = Model.encode_image

    def count(self: Model, images: np.ndarray, **options: int) -> np.ndarray:
        encoded.append(len(images))
        return original(self, images, **options)

    monkeypatch.setattr(Model, "encode_image", count)
    assert main(arguments) == 0
    assert sum(encoded) == COUNT - done and not partial.exists()
    embeddings = np.load(out if command == "embed" else out / "embeddings.npy")
    assert embeddings.shape == (COUNT, 12) and np.ptp(embeddings, axis=0).max() < 1e-6
    assert len(find_images(folder)) == COUNT
