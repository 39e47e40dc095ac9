"""The step on one device and on eight, with and without a teacher."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.statistics import compare
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.sharding import tree_shardings
from tclip_jax.runs.config import LossConfig, OptimizerConfig
from tclip_jax.ternary import Quantizer, TernaryTensor
from tclip_jax.training.objective import Encoders
from tclip_jax.training.optimizer import clip_latent, learning_rate_schedule, make_optimizer, moving_average, soft_phase
from tclip_jax.training.state import TrainState, init_state
from tclip_jax.training.step import MAX_LOGIT_SCALE, make_train_step

CONFIG = CLIPConfig(
    32,
    VisionConfig((16, 16), patch_size=8, width=32, layers=2, head_width=16),
    TextConfig(context_length=8, vocab_size=128, width=32, heads=2, layers=2),
)
TEACHER = CLIPConfig(48, CONFIG.vision, CONFIG.text)
HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=5), 100)
DISTILLED = LossConfig(task=0.5, crd=2.0, icl=0.25, fd=3.0)
Q_ALL = ternary_rules("Q-ALL", Quantizer())


def batch_of(step: int, rows: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (rows, 16, 16, 3), np.uint8),
        "tokens": rng.integers(0, 128, (rows, 8), np.int32),
        "weight": np.ones(rows, np.float32),
    }


class Run:
    """A student on a mesh, with an optional teacher."""

    def __init__(self, mesh: Mesh, rules: Any = (), loss: LossConfig | None = None, **options: Any) -> None:
        self.mesh, self.rules = mesh, rules
        student, loss = CLIP(CONFIG, rules, **options), loss or LossConfig()
        teacher = CLIP(TEACHER) if loss.needs_teacher else None
        self.teacher_params = init_params(teacher, jax.random.key(7)) if teacher else None
        with jax.set_mesh(mesh):
            self.state = init_state(student, OPTIMIZER, 0, TEACHER if teacher else None, mesh, loss)
        self._step = jax.jit(
            make_train_step(
                Encoders(student, MEAN, STD), Encoders(teacher, HALF, HALF) if teacher else None, OPTIMIZER, loss
            ),
            out_shardings=(tree_shardings(self.state, mesh), None),
        )

    def place(self, state: TrainState) -> TrainState:
        return jax.device_put(jax.device_get(state), tree_shardings(state, self.mesh))

    def step(self, state: TrainState, batch: dict[str, np.ndarray]) -> tuple[TrainState, dict[str, float]]:
        with jax.set_mesh(self.mesh):
            state, metrics = self._step(state, shard_batch(batch, self.mesh), self.teacher_params)
        return state, {name: float(value) for name, value in metrics.items()}

    def trits(self, state: TrainState) -> dict[str, np.ndarray]:
        packed = flatten(pack_params(state.params["clip"], self.rules))
        return {path: leaf.trits for path, leaf in packed.items() if isinstance(leaf, TernaryTensor)}


@functools.cache
def run_on(devices: int, rules: Any = (), loss: LossConfig | None = None) -> Run:
    """Compiled once for all tests."""
    return Run(make_mesh(4, 2) if devices == 8 else make_mesh(devices=jax.devices()[:1]), rules, loss)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, DISTILLED])
def test_eight_devices_equal_one_in_full_precision(loss: LossConfig | None) -> None:
    single, sharded = run_on(1, loss=loss), run_on(8, loss=loss)
    a, b = single.state, sharded.state
    for step in range(50):
        a, of_one = single.step(a, batch_of(step))
        b, of_eight = sharded.step(b, batch_of(step))
        assert of_eight["loss"] == pytest.approx(of_one["loss"], rel=1e-5), step
    assert b.params["clip"]["image"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec[-1] == "fsdp"


@pytest.mark.slow
def test_eight_devices_equal_one_in_ternary() -> None:
    """From equal states, trits are equal and losses agree to 1e-6; after 20 separate steps, losses agree to 1e-4."""
    single, sharded = run_on(1, Q_ALL), run_on(8, Q_ALL)
    a, alone = single.state, sharded.state
    for step in range(51):
        if step % 10 == 0:
            same = sharded.place(a)
            for path, trits in single.trits(a).items():
                np.testing.assert_array_equal(sharded.trits(same)[path], trits, err_msg=f"step {step}: {path}")
            loss_from_same = sharded.step(same, batch_of(step))[1]["loss"]
        a, of_one = single.step(a, batch_of(step))
        if step % 10 == 0:
            assert loss_from_same == pytest.approx(of_one["loss"], rel=1e-6), step
        if step < 20:
            alone, of_eight = sharded.step(alone, batch_of(step))
            assert of_eight["loss"] == pytest.approx(of_one["loss"], rel=1e-4), step


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_and_each_model_normalizes_its_pixels() -> None:
    loss = DISTILLED
    run, batch = run_on(1, loss=loss), batch_of(0)
    _, metrics = run.step(run.state, batch)
    terms = {name: metrics[f"loss/{name}"] for name in ("task", "crd", "icl", "fd")}
    assert metrics["loss"] == pytest.approx(sum(loss.weights[name] * term for name, term in terms.items()), rel=1e-5)

    def embed(config: CLIPConfig, params: Any, mean: Any, std: Any) -> Any:
        pixels = (np.float32(batch["image"]) / 255 - np.float32(mean)) / np.float32(std)
        return jax.jit(CLIP(config).apply)({"params": params}, pixels, batch["tokens"])

    student = embed(CONFIG, run.state.params["clip"], MEAN, STD)
    rows = jax.jit(compare)(*student, teacher=embed(TEACHER, run.teacher_params, HALF, HALF))
    assert terms["task"] == pytest.approx(float(contrastive.info_nce_of_rows(*rows)), rel=1e-5)
    assert terms["crd"] == pytest.approx(float(distillation.crd_of_rows(*rows)), rel=1e-4)


@pytest.mark.slow
def test_the_heads_are_trained_and_the_teacher_is_not() -> None:
    run = run_on(1, loss=DISTILLED)
    before = jax.device_get(run.teacher_params)
    state, _ = run.step(run.state, batch_of(0))
    state, _ = run.step(state, batch_of(1))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.teacher_params))
    moved = np.abs(np.asarray(state.params["heads"]["image"]["kernel"] - run.state.params["heads"]["image"]["kernel"]))
    assert moved.max() > 0


def test_a_sample_of_weight_zero_changes_nothing() -> None:
    run = run_on(1, Q_ALL)
    batch, other = batch_of(0), batch_of(0)
    batch["weight"][3] = other["weight"][3] = 0
    other["image"][3] = 0
    results = [run.step(run.state, each) for each in (batch, other)]
    assert results[0][1] == results[1][1] and results[0][1]["bad_samples"] == 1
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(state.params) for state, _ in results))


def test_logit_scale_is_clamped() -> None:
    run = run_on(1)
    for beyond, limit in ((9, MAX_LOGIT_SCALE), (-9, 0)):
        params = {"clip": run.state.params["clip"] | {"logit_scale": jnp.float32(beyond)}}
        state, metrics = run.step(run.state.replace(params=params), batch_of(0))
        assert float(state.params["clip"]["logit_scale"]) == pytest.approx(limit)
        assert metrics["logit_scale"] == pytest.approx(np.exp(limit))


@pytest.mark.slow
def test_weights_are_blended_to_ternary_and_averaged() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    student = Encoders(CLIP(CONFIG, Q_ALL), MEAN, STD)
    step = jax.jit(make_train_step(student, None, OPTIMIZER, LossConfig(), soft_phase(4), ema_decay=0.75))
    old = run.state.replace(average=jax.tree.map(lambda leaf: leaf + 1, run.state.params["clip"]))
    for now, same in ((0, run_on(1)), (4, run)):
        with jax.set_mesh(run.mesh):
            new, metrics = step(old.replace(step=jnp.int32(now)), shard_batch(batch, run.mesh), None)
        assert float(metrics["loss"]) == pytest.approx(same.step(same.state, batch)[1]["loss"], rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, new.average, new.params["clip"])  # after one update


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_soft_trits_end_hard_and_latent_weights_stay_within_their_bound(devices: int) -> None:
    """In 6 steps: blended for 2, annealed for 2, hard for 2; accumulated in two parts, on one device and on eight."""
    run, rules = run_on(devices, Q_ALL), ternary_rules("Q-ALL", Quantizer(dead_zone_bias=0.25))
    student = Encoders(CLIP(CONFIG, rules, remat=devices == 8), MEAN, STD)
    clip = functools.partial(clip_latent, rules=rules, config=OptimizerConfig(latent_clip=1.0))
    options = {"microbatches": 2, "ema_decay": 0.9, "constrain": clip}
    step = jax.jit(make_train_step(student, None, OPTIMIZER, LossConfig(), soft_phase(2, 0.4, 2), **options))
    state = run.state.replace(average=run.state.params["clip"])
    losses = []
    for i in range(6):
        before = jax.device_get(state.params["clip"])
        with jax.set_mesh(run.mesh):
            state, metrics = step(state, shard_batch(batch_of(i), run.mesh), None)
        losses.append(float(metrics["loss"]))
    batch = batch_of(5)
    pixels = (np.float32(batch["image"]) / 255 - np.float32(MEAN)) / np.float32(STD)
    image, text, scale = jax.jit(CLIP(CONFIG).apply)({"params": pack_params(before, rules)}, pixels, batch["tokens"])
    assert losses[-1] == pytest.approx(float(contrastive.info_nce(image, text, scale)), rel=1e-5)
    kernel, path = state.params["clip"]["text"]["blocks"]["mlp"]["fc1"]["kernel"], "text/blocks/mlp/fc1/kernel"
    packed = flatten(pack_params(state.params["clip"], rules))[path]
    assert float(jnp.abs(kernel).max()) < 1.3 * float(packed.scale.max())  # the scale shrinks as weights are clipped
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_bfloat16_and_remat_stay_close_to_float32() -> None:
    plain = run_on(1, Q_ALL)
    half, remat = Run(plain.mesh, Q_ALL, dtype=jnp.bfloat16), Run(plain.mesh, Q_ALL, remat=True)
    losses = [run.step(run.state, batch_of(0))[1]["loss"] for run in (plain, half, remat)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_training_overfits_a_batch() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    state, first = run.step(run.state, batch)
    for _ in range(40):
        state, last = run.step(state, batch)
    assert last["loss"] < 0.5 * first["loss"]


def test_a_skipped_step_changes_only_the_step_number() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    state, metrics = run.step(run.state, batch)
    assert metrics["skipped_steps"] == 0
    broken = state.replace(params={"clip": state.params["clip"] | {"logit_scale": jnp.float32(jnp.nan)}})
    skipped, metrics = run.step(broken, batch)
    assert metrics["skipped_steps"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, broken.params, skipped.params)
    jax.tree.map(np.testing.assert_array_equal, broken.optimizer, skipped.optimizer)
    assert int(skipped.step) == 2 and int(optax.tree.get(skipped.optimizer, "count")) == 1


@jax.custom_vjp
def poisoned(x: jax.Array, poison: jax.Array) -> jax.Array:
    """Returns `x`; its gradient is multiplied by `poison`."""
    return x


poisoned.defvjp(lambda x, poison: (x, poison), lambda poison, g: (g * poison, jnp.zeros_like(poison)))


class Table(Encoders):
    """An encoder whose embeddings are its parameters; the batch's `poison` multiplies the gradient of the images."""

    def __call__(self, params: Any, batch: Any, loss: Any = None, key: Any = None) -> Any:
        image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (params["image"], params["text"]))
        return poisoned(image, batch["poison"][0]), text, {}


TABLE = OptimizerConfig(learning_rate=0.1, warmup_steps=3, weight_decay=0.2, eps=1e-3)


def run_table(poisons: Any, decay: float = 0.9) -> list[tuple[TrainState, dict[str, float]]]:
    """Returns the states and metrics of a run whose gradients are multiplied by these factors."""
    rng = np.random.default_rng(0)
    optimizer = make_optimizer(TABLE, 20)
    clip: Any = {name: jnp.float32(rng.normal(size=(4, 3))) for name in ("image", "text")}
    clip["logit_scale"] = jnp.float32(1.0)
    state = TrainState(jnp.int32(0), {"clip": clip}, optimizer.init({"clip": clip}), jax.tree.map(jnp.copy, clip))
    step = jax.jit(make_train_step(Table(None, MEAN, STD), None, optimizer, LossConfig(), None, decay))  # type: ignore[arg-type]
    batch: Any = {"tokens": jnp.zeros((4, 1), jnp.int32), "weight": jnp.ones(4)}
    history = []
    for poison in poisons:
        state, metrics = step(state, batch | {"poison": jnp.full(4, poison, jnp.float32)}, None)
        history.append((state, {name: float(value) for name, value in metrics.items()}))
    return history


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_with_a_finite_loss_and_an_infinite_gradient_is_skipped(poison: float) -> None:
    (before, _), (after, metrics), (_, last) = run_table([1, poison, 1])
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert metrics["skipped_steps"] == 1 and last["skipped_steps"] == 0 and np.isfinite(last["gradient_norm"])
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=None), after.replace(step=None))
    assert int(after.step) == int(before.step) + 1


def test_a_batch_without_a_usable_sample_changes_nothing() -> None:
    """With zero gradients, AdamW would still apply its moments and the weight decay."""
    (before, _), _ = run_table([1, 1])
    batch: Any = {"tokens": jnp.zeros((4, 1), jnp.int32), "poison": jnp.ones(4)}
    optimizer = make_optimizer(TABLE, 20)
    step = jax.jit(make_train_step(Table(None, MEAN, STD), None, optimizer, LossConfig(), None, 0.9))  # type: ignore[arg-type]
    for usable, weight in ((False, np.zeros(4)), (True, np.array([0, 1, 1, 0]))):
        after, metrics = step(before, batch | {"weight": jnp.float32(weight)}, None)
        same = [np.array_equal(*each) for each in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
        assert metrics["skipped_steps"] == (not usable) and sum(same) == (len(same) - 1 if not usable else 0)
        assert int(after.step) == int(before.step) + 1


def test_a_skipped_step_is_not_an_update_and_its_learning_rate_is_unused() -> None:
    """The reference is Adam in NumPy float64 over the other steps, each with the learning rate of its step."""
    poisons = [1, 1, np.nan, 1, np.nan, np.nan, 1, 1]
    states = run_table(poisons)
    rates = [float(learning_rate_schedule(TABLE, 20)(step)) for step in range(len(poisons))]
    start = np.float64(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    assert rates[0] == 0  # the first step of the warmup
    previous, count = start, 0
    for poison, rate, (state, _) in zip(poisons, rates, states, strict=True):
        now = np.float64(state.params["clip"]["image"])
        if np.isnan(poison):
            np.testing.assert_array_equal(now, previous)
            continue
        count += 1
        mu, nu = (np.float64(optax.tree.get(state.optimizer, name)["clip"]["image"]) for name in ("mu", "nu"))
        direction = (mu / (1 - 0.9**count)) / (np.sqrt(nu / (1 - 0.98**count)) + 1e-3) + 0.2 * previous
        np.testing.assert_allclose(now, previous - rate * direction, rtol=0, atol=1e-6)
        assert int(optax.tree.get(state.optimizer, "count")) == count
        previous = now


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.99999])
def test_the_average_has_no_weight_on_initial_parameters(decay: float) -> None:
    poisons = [1, 1, 1, np.nan, 1, 1, np.nan, 1, 1, 1, 1, 1]
    states, applied = run_table(poisons, decay), []
    for poison, (state, _) in zip(poisons, states, strict=True):
        if np.isfinite(poison):
            applied.append(np.float64(state.params["clip"]["image"]))
        weights = decay ** np.arange(len(applied) - 1, -1, -1, dtype=np.float64)
        expected = np.tensordot(weights / weights.sum(), np.array(applied), 1)
        np.testing.assert_allclose(state.average["image"], expected, rtol=2e-6, atol=2e-6)


def test_the_average_equals_that_of_optax_after_many_updates() -> None:
    theirs = optax.ema(0.999, debias=True)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 6)).astype(np.float32).cumsum(0)
    ours, state = jnp.full(6, 1e6), theirs.init(jnp.zeros(6))
    follow = jax.jit(lambda average, value, n: moving_average(average, value, 0.999, n))
    for n, value in enumerate(values, 1):
        ours = follow(ours, value, n)
        expected, state = theirs.update(jnp.asarray(value), state)
    weights = 0.999 ** np.arange(499, -1, -1, dtype=np.float64)
    np.testing.assert_allclose(ours, (weights / weights.sum()) @ np.float64(values), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-4)
