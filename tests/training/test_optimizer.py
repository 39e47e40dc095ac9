"""The learning rate schedule, parameter groups, weight decay, and the moving average."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.parallel.sharding import path_of
from tclip_jax.runs.config import OptimizerConfig
from tclip_jax.training.optimizer import decays, learning_rate_schedule, make_optimizer, moving_average, quant_lambda


def test_warmup_and_cosine_decay() -> None:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    expected = [min(step / 10, 0.5 * (1 + np.cos(np.pi * max(step - 10, 0) / 100))) for step in range(111)]
    np.testing.assert_allclose([schedule(step) for step in range(111)], expected, atol=1e-6)


def test_recovery_is_a_low_constant_rate_at_the_end() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, recovery_steps=40, recovery_learning_rate=0.05)
    schedule = learning_rate_schedule(config, 150)
    np.testing.assert_allclose(schedule(60), 0.05 + 0.95 / 2, rtol=1e-6)  # halfway down
    np.testing.assert_allclose([schedule(step) for step in (110, 130, 149)], 0.05, rtol=1e-6)
    assert schedule(109) > 0.05


def test_the_quantization_blend_reaches_one_exactly() -> None:
    share = quant_lambda(7)
    assert share is not None and quant_lambda(0) is None
    shares = [float(jax.jit(share)(step)) for step in (*range(9), 10**6)]
    assert shares[0] == 0 and shares[7:] == [1, 1, 1]
    np.testing.assert_allclose(shares[:7], np.arange(7) / 7, rtol=1e-6)


def test_the_first_matching_group_sets_learning_rate_and_decay() -> None:
    groups = (
        (".*/fc1/kernel", {"learning_rate": 0.5}),
        (".*/kernel", {"weight_decay": 0.0}),
        (".*_scale", {"learning_rate": 0.1, "weight_decay": 0.3}),
    )
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, eps=1e-12, groups=groups)
    names = ("fc1/kernel", "fc2/kernel", "table", "kernel_scale")
    params: Any = {"clip": {name: jnp.full((1, 1), 2.0) for name in names}}
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = make_optimizer(config, 10)
    updates = optimizer.update(gradients, optimizer.init(params), params, step=0)[0]["clip"]
    # Adam's first update is the sign of the gradient.
    expected = {"fc1/kernel": 0.5 * (1 + 0.4), "fc2/kernel": 1, "table": 1 + 0.4, "kernel_scale": 0.1 * (1 + 0.6)}
    for name, value in expected.items():
        np.testing.assert_allclose(updates[name], -0.1 * value, rtol=1e-5, err_msg=name)
    shadowed = OptimizerConfig(groups=((".*", {}), (".*/kernel", {"weight_decay": 0.0})))
    optimizer = make_optimizer(shadowed, 10)
    with pytest.raises(ValueError, match=r"groups: '\.\*/kernel' matches no parameter of its own"):
        optimizer.update(gradients, optimizer.init(params), params, step=0)


def test_only_matrices_have_weight_decay() -> None:
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
    params = {"w": jnp.asarray(w)}
    updates, _ = optimizer.update({"w": jnp.asarray(g)}, optimizer.init(params), params, step=0)
    g64 = np.float64(g) * (clip_norm if clip_norm else 1.0)  # |g| = 1
    expected = -0.1 * (g64 / (np.abs(g64) + 1e-3) + 0.2 * w)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("decay", [0.25, 0.9, 0.9999])
def test_the_average_is_the_weighted_mean_of_the_parameters_after_each_update(decay: float) -> None:
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    average = {"w": jnp.full(5, jnp.nan), "b": jnp.full((), 1e6)}  # before the first update, any values
    for n in range(1, 8):
        average = moving_average(average, {"w": values[n - 1], "b": values[n - 1, 0]}, decay, jnp.int32(n))
        weights = decay ** np.arange(n - 1, -1, -1, dtype=np.float64)
        expected = weights @ np.float64(values[:n]) / weights.sum()
        np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(average["b"], expected[0], rtol=1e-5, atol=1e-6)
