"""The learning rate schedule, parameter groups, weight decay, and the moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import optax.contrib
import pytest

from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import model_cfg
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh
from tclip_jax.parallel.sharding import path_of
from tclip_jax.planning.estimate import device_bytes
from tclip_jax.runs.config import OptimizerConfig, base_config, run_config
from tclip_jax.ternary import Quantizer, find_levels
from tclip_jax.training.build import Build
from tclip_jax.training.optimizer import (
    OPTIMIZERS,
    clip_latent,
    decays,
    learning_rate_schedule,
    make_optimizer,
    moving_average,
    soft_phase,
    updates_done,
)


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


def test_an_added_recovery_is_a_second_cosine_after_the_first_has_reached_zero() -> None:
    """FTerViT: the schedule of 150 steps is that of 110, then 40 more from a tenth of the rate to 0."""
    rates = {"learning_rate": 1.0, "warmup_steps": 10}
    added = OptimizerConfig(**rates, recovery_steps=40, recovery_learning_rate=0.1, recovery_decay="cosine")  # type: ignore[arg-type]
    schedule, alone = learning_rate_schedule(added, 150), learning_rate_schedule(OptimizerConfig(**rates), 110)  # type: ignore[arg-type]
    np.testing.assert_allclose([schedule(step) for step in range(110)], [alone(step) for step in range(110)], rtol=1e-6)
    expected = [0.05 * (1 + np.cos(np.pi * step / 40)) for step in range(41)]
    np.testing.assert_allclose([schedule(step) for step in range(110, 151)], expected, atol=1e-7)


def test_the_quantization_blend_reaches_one_exactly() -> None:
    schedule = soft_phase(7)
    assert schedule is not None and soft_phase(0) is None
    blends = [float(jax.jit(lambda step: schedule(step).quant_lambda)(step)) for step in (*range(9), 10**6)]
    assert blends[0] == 0 and blends[7:] == [1, 1, 1]
    np.testing.assert_allclose(blends[:7], np.arange(7) / 7, rtol=1e-6)
    assert schedule(jnp.int32(3)).temperature is None


@pytest.mark.parametrize("blend", [0, 4])
def test_the_temperature_falls_after_the_blend_to_exactly_zero(blend: int) -> None:
    schedule = soft_phase(blend, 0.4, 10)
    assert schedule is not None
    shares, temperatures = zip(*(map(float, jax.jit(schedule)(step)) for step in range(30)), strict=True)  # type: ignore[arg-type]
    assert shares[blend:] == (1,) * (30 - blend)
    np.testing.assert_allclose(temperatures[: blend + 1], 0.4, rtol=1e-6)
    falling = [0.2 * (1 + np.cos(np.pi * step / 10)) for step in range(10)]
    np.testing.assert_allclose(temperatures[blend : blend + 10], falling, rtol=1e-5, atol=1e-7)
    assert temperatures[blend + 10 :] == (0,) * (20 - blend)


def test_latent_weights_are_clipped_in_scales_of_their_group() -> None:
    rng, rules = np.random.default_rng(0), ternary_rules("Q-ALL", Quantizer(group=8, scale_bits=24))
    kernel, table = rng.normal(size=(2, 16, 3)).astype(np.float32), rng.normal(size=(5, 16)).astype(np.float32)
    params = {"image": {"blocks": {"mlp": {"fc1": {"kernel": kernel, "bias": 9 * np.ones((2, 3))}}}}}
    tree: Any = {"clip": params | {"text": {"token_embedding": {"embedding": table}}}, "heads": {"kernel": kernel}}
    config = OptimizerConfig(latent_clip=1.25)
    whole = clip_latent(tree, rules, config)
    clipped = whole["clip"]
    bound = 2.5 * np.abs(np.float64(kernel)).reshape(2, 2, 8, 3).mean(2).repeat(8, axis=1)
    mlp = clipped["image"]["blocks"]["mlp"]["fc1"]
    np.testing.assert_allclose(mlp["kernel"], np.clip(kernel, -bound, bound), rtol=1e-6)
    rows = 2.5 * np.abs(np.float64(table)).reshape(5, 2, 8).mean(2).repeat(8, axis=1)
    np.testing.assert_allclose(clipped["text"]["token_embedding"]["embedding"], np.clip(table, -rows, rows), rtol=1e-6)
    assert np.any(mlp["kernel"] != kernel) and np.all(mlp["bias"] == 9) and whole["heads"]["kernel"] is kernel
    assert clip_latent(tree, rules, OptimizerConfig()) is tree
    uniform = ternary_rules("Q-ALL", Quantizer(kind="uniform", bits=4))
    jax.tree.map(np.testing.assert_array_equal, clip_latent(tree, uniform, config), tree)
    groups = (("clip/text/.*", {"learning_rate": 2.0}), (".*", None))
    frozen = clip_latent(tree, rules, OptimizerConfig(latent_clip=1.25, groups=groups))["clip"]
    np.testing.assert_array_equal(frozen["image"]["blocks"]["mlp"]["fc1"]["kernel"], kernel)
    assert np.any(frozen["text"]["token_embedding"]["embedding"] != table)


@pytest.mark.parametrize(
    "quantizer",
    [*({"factor": k} for k in (1.0, 1.5, 2.0, 3.0)), *({"kind": k} for k in ("twn", "least_squares", "sherry"))],
)
def test_a_latent_clip_that_cuts_evenly_spread_weights_is_refused(quantizer: dict[str, Any]) -> None:
    even = np.random.default_rng(0).permutation(np.linspace(0, 1, 2**14, dtype=np.float32))[:, None]
    levels = find_levels(jnp.asarray(even), Quantizer(**quantizer, group="tensor", scale_bits=24))
    config = base_config()
    config.ternary = "Q-ALL"
    config.quantizer.update(quantizer)
    config.optimizer.latent_clip = 1.02 / float(levels.scale[0, 0])
    assert run_config(config).optimizer.latent_clip > 0
    config.optimizer.latent_clip *= 0.98 / 1.02
    with pytest.raises(ValueError, match=r"latent_clip is .* would lower the scales of"):
        run_config(config)


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


def muon(rate: float) -> optax.GradientTransformation:
    """For the layers of blocks; optax's own takes Nesterov's momentum for all other parameters too."""
    layers = {"clip": {"blocks": {"kernel": optax.contrib.MuonDimensionNumbers(1, 2)}, "table": optax.MaskedNode()}}
    blocks = optax.contrib.muon(
        rate, beta=0.9, weight_decay=0.2, muon_weight_dimension_numbers=layers, consistent_rms=0.2
    )
    labels = {"clip": {"blocks": {"kernel": "muon"}, "table": "adamw"}}
    return optax.partition({"muon": blocks, "adamw": OPTAX["adamw"](rate)}, labels)


OPTAX: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": lambda rate: optax.adamw(rate, 0.9, 0.98, 1e-6, weight_decay=0.2),
    "adafactor": lambda rate: optax.adafactor(
        rate, momentum=0.9, multiply_by_parameter_scale=False, weight_decay_rate=0.2 * rate
    ),
    "lion": lambda rate: optax.lion(rate, 0.9, 0.98, weight_decay=0.2),
    "muon": muon,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_those_of_optax(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.2, b2=0.98)
    rng = np.random.default_rng(0)
    params = {"clip": {"blocks": {"kernel": rng.normal(size=(2, 130, 140))}, "table": rng.normal(size=(150, 3))}}
    params = expected = jax.tree.map(jnp.float32, params)
    ours, theirs = make_optimizer(config, 10**7), OPTAX[name](0.1)
    state, others = ours.init(params), theirs.init(params)
    for step in range(3):
        gradients = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
        updates, state = ours.update(gradients, state, params, step=step)
        params = optax.apply_updates(params, updates)
        updates, others = theirs.update(gradients, others, expected)
        expected = optax.apply_updates(expected, updates)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), params, expected)
    assert updates_done(state) == 3


def test_the_declared_optimizers_are_the_registered_ones(config: ml_collections.ConfigDict) -> None:
    assert get_args(get_type_hints(OptimizerConfig)["name"]) == tuple(OPTIMIZERS)
    config.optimizer.name = "adamv"
    with pytest.raises(ValueError, match=r"^config\.optimizer\.name .*'adamv'"):
        run_config(config)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("adafactor", 0.5, 0.53), ("lion", 0.5, 0.501), ("muon", 0.55, 0.65)]
)
def test_optimizers_hold_less_than_adamw_and_bfloat16_halves_the_first_moment(
    config: ml_collections.ConfigDict, name: str, least: float, most: float
) -> None:
    config.model = model_cfg("ViT-B-32")

    def held(**changes: str) -> int:
        config.optimizer.update(changes)
        with jax.set_mesh(mesh := make_mesh(2, 4)):
            state = Build(run_config(config), mesh, None).state_shapes
            sharded = [x for x in jax.tree.leaves(state.optimizer) if x.sharding.spec[-1:] == ("fsdp",)]
            assert sharded
            return device_bytes(state.optimizer)

    adamw, other = held(), held(name=name)
    assert least < other / adamw < most
    assert other - held(mu_dtype="bfloat16") == pytest.approx(adamw / 4, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_frozen_parameters_stay_as_they_are_and_cost_nothing(
    config: ml_collections.ConfigDict, microbatches: int
) -> None:
    config.data.microbatches, config.optimizer.clip_norm = microbatches, 0.1
    norms, flops, held, mesh = {}, {}, {}, make_mesh(devices=jax.devices()[:1])
    for frozen in ("", "image", "text"):
        groups = {"": (), "image": (("clip/image/.*", None),), "text": (("clip/(?!image/).*", None),)}[frozen]
        config.optimizer.groups = groups
        build = Build(run_config(config), mesh, None)
        with jax.set_mesh(mesh):
            state = build.init_state()
            before = jax.tree.map(np.asarray, state.params["clip"])
            rng, rows = np.random.default_rng(0), config.data.batch_size
            shapes = build.batch_shapes
            batch = {
                "image": rng.integers(0, 256, shapes["image"].shape, np.uint8),
                "tokens": rng.integers(0, 9, shapes["tokens"].shape, np.int32),
                "weight": np.ones(rows, np.float32),
                "fault": np.zeros(rows, np.int32),
            }
            step = build.jitted_step(state).lower(state, batch, None).compile()
            flops[frozen], held[frozen] = step.cost_analysis()["flops"], device_bytes(build.state_shapes.optimizer)
            state, metrics = step(state, batch, None)
            norms[frozen] = float(metrics["gradient_norm"])
        same = jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, state.params["clip"]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(same):
            is_frozen = bool(frozen) and (path_of(path).startswith("image/") is (frozen == "image"))
            assert leaf is is_frozen or path_of(path).endswith(("qkv/bias", "token_embedding/embedding")), path_of(path)
    assert norms[""] ** 2 == pytest.approx(norms["image"] ** 2 + norms["text"] ** 2, rel=1e-4)
    # Without a tower's backward pass; the forward pass is a third.
    assert flops["image"] + flops["text"] < 1.4 * flops[""]
    assert held["image"] + held["text"] == pytest.approx(held[""], rel=0.01)


def test_a_rule_that_freezes_nothing_is_refused(config: ml_collections.ConfigDict) -> None:
    config.optimizer.groups = (("clip/.*", {}), ("clip/image/.*", None))
    with pytest.raises(ValueError, match=r"groups: 'clip/image/\.\*' matches no parameter of its own"):
        Build(run_config(config), make_mesh(), None).state_shapes  # noqa: B018


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
