"""A model so small that a test may train it, and runs of it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import ml_collections
import pytest

from tclip_jax.training.config import base_config


@pytest.fixture(autouse=True)
def fast_compilation() -> Iterator[None]:
    """Compiling is nearly all of these tests' time, half of it optimizing what then runs for milliseconds."""
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
