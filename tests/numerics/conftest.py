"""Fixtures: a small model, a batch that fills its context, and the exported folder for PyTorch."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.numerics.inputs import sample_batch

Batch = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="session")
def model() -> Model:
    """Random weights; none keeps its initial 0 or 1."""
    vision = VisionConfig(image_size=(16, 16), patch_size=8, width=32, layers=3, head_width=16)
    config = CLIPConfig(24, vision, TextConfig(context_length=12, width=16, heads=2, layers=2))
    rng = np.random.default_rng(0)

    def leaf(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path[-1].key in ("scale", "logit_scale") else 0.0
        return mean + 0.1 * rng.standard_normal(shape.shape, np.float32)

    return Model(config, Preprocess(16), jax.tree_util.tree_map_with_path(leaf, param_shapes(config)))


@pytest.fixture(scope="session")
def batch(model: Model) -> Batch:
    return sample_batch(model, 4)


@pytest.fixture(scope="session")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The model as a folder of open_clip and transformers; no test may change it."""
    folder = tmp_path_factory.mktemp("numerics") / "export"
    export_model(folder, config=model.config, preprocess=model.preprocess, params=model.params)
    return folder
