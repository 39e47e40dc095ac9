"""Where the pages' code runs: a folder with what their first commands leave."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tclip_jax.artifacts import write_artifact
from tclip_jax.artifacts.pack import pack_params
from tclip_jax.models.clip import param_shapes
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import run_config


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model of the quick start's shape, at random, as an artifact."""
    run = run_config(override(load_recipe("quickstart:student"), ["teacher=any"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), param_shapes(run.model))
    folder = tmp_path_factory.mktemp("docs") / "artifact"
    packed = pack_params(params, run.rules)
    write_artifact(folder, config=run.model, preprocess=run.preprocess, params=packed, rules=run.rules)
    return folder


@pytest.fixture
def workplace(packed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The current folder: the artifact under the names that pages give it, and a picture."""
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for name in ("artifact", "runs/quickstart/artifact"):
        (tmp_path / name).symlink_to(packed)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path
