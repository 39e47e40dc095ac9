"""Random parameters without any 0 or 1, so that a dropped or exchanged tensor is detected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

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
