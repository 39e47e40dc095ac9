"""The schedule at its corners, and weight decay on matrices only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.parallel.rules import path_of
from tclip_jax.training.config import OptimizerConfig
from tclip_jax.training.optimizer import decays, learning_rate_schedule, make_optimizer


def test_schedule() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    expected = [min(step / 10, 0.5 * (1 + np.cos(np.pi * max(step - 10, 0) / 100))) for step in range(111)]
    np.testing.assert_allclose([schedule(step) for step in range(111)], expected, atol=1e-6)


def test_decay_is_for_matrices() -> None:
    shapes = {"clip": param_shapes(CLIPConfig.from_open_clip(model_cfg("tiny")))}
    marked = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decays(shapes))}
    free = {path for path, decayed in marked.items() if not decayed}
    assert all(path.endswith(("/bias", "/scale", "class_embedding", "logit_scale")) for path in free)
    assert all(not path.endswith(("/bias", "/scale", "logit_scale")) for path in marked.keys() - free)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_one_step_equals_adamw_by_hand(clip_norm: float) -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, b1=0.8, b2=0.9, eps=1e-3, clip_norm=clip_norm)
    optimizer = make_optimizer(config, 10)
    w, g = np.array([[1.0, -2.0]], np.float32), np.array([[0.6, 0.8]], np.float32)
    updates, _ = optimizer.update({"w": jnp.asarray(g)}, optimizer.init({"w": jnp.asarray(w)}), {"w": jnp.asarray(w)})
    g64 = np.float64(g) * (clip_norm if clip_norm else 1.0)  # |g| = 1
    expected = -0.1 * (g64 / (np.abs(g64) + 1e-3) + 0.2 * w)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)
