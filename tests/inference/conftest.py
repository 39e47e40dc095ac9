"""A small model, and a folder of pictures, one of them damaged."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tclip_jax.artifacts import write_artifact
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An artifact with random weights, none of them at its initial 0 or 1."""
    vision = VisionConfig(image_size=(16, 16), patch_size=8, width=16, layers=1, head_width=8)
    config = CLIPConfig(12, vision, TextConfig(context_length=12, width=16, heads=2, layers=1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(config))
    folder = tmp_path_factory.mktemp("inference") / "artifact"
    write_artifact(folder, config=config, preprocess=Preprocess(16), params=params, rules=())
    return folder


@pytest.fixture(scope="session")
def model(artifact: pathlib.Path) -> Model:
    return Model.load(artifact)


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    """Seven pictures in two folders, a damaged one, and other files."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for i, name in enumerate(("0.png", "1.jpg", "2.PNG", "b/3.webp", "b/4.png", "b/5.png", "b/6.png")):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / name)
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "7.png").write_bytes((folder / "0.png").read_bytes())
    return folder


@pytest.fixture
def readable(pictures: pathlib.Path) -> list[epath.Path]:
    """The readable pictures, sorted by path."""
    return [epath.Path(path) for path in sorted(pictures.rglob("[0-6].*")) if ".hidden" not in path.parts]
