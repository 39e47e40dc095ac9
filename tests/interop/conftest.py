"""Random parameters without any 0 or 1, so that a dropped or exchanged tensor is detected; a folder to push."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig


@pytest.fixture(scope="session")
def random_params() -> Callable[[CLIPConfig], dict[str, Any]]:
    def draw(config: CLIPConfig) -> dict[str, Any]:
        rng = np.random.default_rng(0)

        def leaf(path: tuple[jax.tree_util.DictKey, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
            mean = 1.0 if path[-1].key in ("scale", "logit_scale") else 0.0
            return mean + 0.1 * rng.standard_normal(shape.shape, np.float32)

        return jax.tree_util.tree_map_with_path(leaf, param_shapes(config))

    return draw


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Two large files, two small ones in a folder of their own, and a card."""
    root = tmp_path / "release"
    (root / "stablehlo").mkdir(parents=True)
    (root / "README.md").write_text("---\ntags: [clip]\n---\n# Model\n")
    (root / "config.json").write_text("{}\n")
    (root / "stablehlo" / "load.py").write_text("import jax\n")
    for seed, name in enumerate(("model.safetensors", "open_clip_model.safetensors")):
        array = np.random.default_rng(seed).standard_normal(1000, np.float32)
        safetensors.numpy.save_file({"w": array}, root / name)
    return root
