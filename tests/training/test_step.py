"""The step on one device and on eight, with and without a teacher."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from tclip_jax.artifacts.pack import flatten, pack_params
from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.rows import compare
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.parallel.mesh import make_mesh, shard_batch
from tclip_jax.parallel.rules import tree_shardings
from tclip_jax.ternary import Quantizer, TernaryTensor
from tclip_jax.training.config import LossConfig, OptimizerConfig
from tclip_jax.training.objective import Encoders
from tclip_jax.training.optimizer import make_optimizer, ternary_share
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
    """A student on a mesh, with a teacher if asked."""

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


@pytest.mark.parametrize("loss", [None, DISTILLED])
def test_eight_devices_equal_one_in_full_precision(loss: LossConfig | None) -> None:
    single, sharded = run_on(1, loss=loss), run_on(8, loss=loss)
    a, b = single.state, sharded.state
    for step in range(50):
        a, of_one = single.step(a, batch_of(step))
        b, of_eight = sharded.step(b, batch_of(step))
        assert of_eight["loss"] == pytest.approx(of_one["loss"], rel=1e-5), step
    assert b.params["clip"]["image"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.spec[-1] == "fsdp"


def test_eight_devices_equal_one_in_ternary() -> None:
    """From the same state trits are equal and losses are to 1e-6; left alone for 20 steps, losses are to 1e-4."""
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


def test_loss_is_the_weighted_sum_of_its_terms_with_each_model_normalised_its_own_way() -> None:
    loss = DISTILLED
    run, batch = run_on(1, loss=loss), batch_of(0)
    _, metrics = run.step(run.state, batch)
    terms = {name: metrics[f"loss/{name}"] for name in ("task", "crd", "icl", "fd")}
    assert metrics["loss"] == pytest.approx(sum(getattr(loss, name) * term for name, term in terms.items()), rel=1e-5)

    def embed(config: CLIPConfig, params: Any, mean: Any, std: Any) -> Any:
        pixels = (np.float32(batch["image"]) / 255 - np.float32(mean)) / np.float32(std)
        return CLIP(config).apply({"params": params}, pixels, batch["tokens"])

    student = embed(CONFIG, run.state.params["clip"], MEAN, STD)
    rows = compare(*student, teacher=embed(TEACHER, run.teacher_params, HALF, HALF))
    assert terms["task"] == pytest.approx(float(contrastive.info_nce(*rows)), rel=1e-5)
    assert terms["crd"] == pytest.approx(float(distillation.crd(*rows)), rel=1e-4)


def test_teacher_is_not_trained_and_its_heads_are() -> None:
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


def test_weights_become_ternary_by_degrees_and_their_average_follows() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    student = Encoders(CLIP(CONFIG, Q_ALL), MEAN, STD)
    step = jax.jit(make_train_step(student, None, OPTIMIZER, LossConfig(), ternary_share(4), ema_decay=0.75))
    old = run.state.replace(average=jax.tree.map(lambda leaf: leaf + 1, run.state.params["clip"]))
    for now, same in ((0, run_on(1)), (4, run)):
        with jax.set_mesh(run.mesh):
            new, metrics = step(old.replace(step=jnp.int32(now)), shard_batch(batch, run.mesh), None)
        assert float(metrics["loss"]) == pytest.approx(same.step(same.state, batch)[1]["loss"], rel=1e-5)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, old.average, new.params["clip"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), new.average, expected)


def test_bfloat16_and_remat_stay_near() -> None:
    plain = run_on(1, Q_ALL)
    half, remat = Run(plain.mesh, Q_ALL, dtype=jnp.bfloat16), Run(plain.mesh, Q_ALL, remat=True)
    losses = [run.step(run.state, batch_of(0))[1]["loss"] for run in (plain, half, remat)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03) and losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_training_learns_a_batch_by_heart() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    state, first = run.step(run.state, batch)
    for _ in range(40):
        state, last = run.step(state, batch)
    assert last["loss"] < 0.5 * first["loss"]


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts() -> None:
    run, batch = run_on(1, Q_ALL), batch_of(0)
    state, metrics = run.step(run.state, batch)
    assert metrics["skipped_steps"] == 0
    broken = state.replace(params={"clip": state.params["clip"] | {"logit_scale": jnp.float32(jnp.nan)}})
    skipped, metrics = run.step(broken, batch)
    assert metrics["skipped_steps"] == 1 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, broken.params, skipped.params)
    for before, after in zip(jax.tree.leaves(broken.optimizer), jax.tree.leaves(skipped.optimizer), strict=True):
        counts = jnp.issubdtype(before.dtype, jnp.integer)
        np.testing.assert_array_equal(after, before + 1 if counts else before)
    assert int(skipped.step) == 2
