"""Distillation losses against NumPy float64, finite differences, PyTorch and open_clip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tclip_jax import losses
from tclip_jax.losses import feature_distillation

BATCH, WIDTH = 8, 6
SCALES = np.float32(20), np.float32(100)
Arrays = tuple[Any, ...]


def unit_vectors(seed: int, batch: int = BATCH, width: int = WIDTH) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(batch, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_batch(seed: int, batch: int = BATCH) -> tuple[np.ndarray, ...]:
    """Image and text of the student, then of the teacher."""
    return tuple(unit_vectors(4 * seed + i, batch) for i in range(4))


def on_grid(x: np.ndarray) -> np.ndarray:
    """Round to multiples of 2⁻⁸, so that float32 holds logits of up to 100 exactly."""
    return np.round(256 * x) / 256


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def crd_float64(v: Any, t: Any, V: Any, T: Any, scale: Any, teacher_scale: Any) -> float:
    student, teacher = scale * v @ t.T, teacher_scale * V @ T.T
    pairs = [(log_softmax(teacher), log_softmax(student)), (log_softmax(teacher.T), log_softmax(student.T))]
    return sum(np.sum(np.exp(p) * (p - q)) for p, q in pairs) / 2 / len(v)


def affinity_mimicking_float64(v: Any, t: Any, V: Any, T: Any, scale: Any, teacher_scale: Any) -> float:
    student, teacher = scale * v @ t.T, teacher_scale * V @ T.T
    pairs = [(log_softmax(teacher), log_softmax(student)), (log_softmax(teacher.T), log_softmax(student.T))]
    return -sum(np.sum(np.exp(p) * q) for p, q in pairs) / len(v)


def icl_float64(v: Any, t: Any, V: Any, T: Any, scale: Any, teacher_scale: Any) -> float:
    return -np.mean(np.diag(log_softmax(scale * v @ T.T)) + np.diag(log_softmax(scale * t @ V.T))) / 2


def icl(v: Any, t: Any, V: Any, T: Any, scale: Any, tokens: Any = None, weight: Any = None) -> jax.Array:
    V, T = jax.lax.stop_gradient((V, T))
    return losses.interactive_contrastive(v, t, V, T, scale, tokens=tokens, weight=weight)


def kl_mix_float64(v: Any, t: Any, V: Any, T: Any, scale: Any, teacher_scale: Any) -> float:
    forward = crd_float64(v, t, V, T, scale, teacher_scale)
    return 0.7 * forward + 0.3 * crd_float64(V, T, v, t, teacher_scale, scale)


# Each loss with its oracle: functions of student v, t, teacher V, T and both scales.
LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., float]]] = {
    "crd": (
        lambda v, t, V, T, s, S, weight=None: losses.crd(v, t, s, (V, T, S), weight=weight),
        crd_float64,
    ),
    "kl_mix": (
        lambda v, t, V, T, s, S, weight=None: losses.kl_mix(v, t, s, (V, T, S), 0.3, weight=weight),
        kl_mix_float64,
    ),
    "open_clip": (
        lambda v, t, V, T, s, S, weight=None: losses.open_clip_distillation(v, t, s, (V, T, S), weight=weight),
        lambda *batch: affinity_mimicking_float64(*batch) / 2,
    ),
    "affinity_mimicking": (
        lambda v, t, V, T, s, S, weight=None: losses.affinity_mimicking(v, t, s, (V, T, S), weight=weight),
        affinity_mimicking_float64,
    ),
    "icl": (lambda v, t, V, T, s, S, weight=None: icl(v, t, V, T, s, weight=weight), icl_float64),
    "mse": (
        lambda v, t, V, T, s, S, weight=None: feature_distillation(v, V, "mse", weight),
        lambda v, t, V, T, s, S: np.mean((v - V) ** 2),
    ),
    "cosine": (
        lambda v, t, V, T, s, S, weight=None: feature_distillation(v, V, "cosine", weight),
        lambda v, t, V, T, s, S: np.mean([1 - a @ b for a, b in zip(v, V, strict=True)]),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def value_and_gradients(name: str) -> Callable[..., tuple[jax.Array, Arrays]]:
    return jax.jit(jax.value_and_grad(LOSSES[name][0], argnums=tuple(range(6))))


def oracle(name: str, *batch: Any) -> float:
    return LOSSES[name][1](*(np.asarray(array, np.float64) for array in batch))


@every_loss
@pytest.mark.parametrize("scales", [(1.0, 14.3), (100.0, 20.0), (20.0, 100.0)])
def test_value_equals_numpy(name: str, scales: tuple[float, float]) -> None:
    batch = random_batch(0)
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        value, _ = value_and_gradients(name)(*batch, *scales)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(name, *batch, *scales), rtol=2e-6)


@every_loss
@pytest.mark.parametrize("seed", range(3))
def test_student_gradient_along_a_direction_equals_finite_differences(name: str, seed: int) -> None:
    batch = (*random_batch(seed), *SCALES)
    _, gradients = value_and_gradients(name)(*batch)
    rng = np.random.default_rng(seed)
    # The teacher is frozen, so only the student's image, text and scale vary.
    direction = [rng.normal(size=np.shape(array)) if i in (0, 1, 4) else 0.0 for i, array in enumerate(batch)]
    ahead, behind = (
        oracle(name, *(array + step * d for array, d in zip(batch, direction, strict=True))) for step in (1e-6, -1e-6)
    )
    terms = [np.float64(gradient) * d for gradient, d in zip(gradients, direction, strict=True)]
    slope, magnitude = (sum(np.sum(each(term)) for term in terms) for each in (np.asarray, np.abs))
    # The terms cancel: they are up to 13 times as large as their sum, so their rounding sets the tolerance.
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=0, atol=4e-7 * magnitude)


@every_loss
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    _, (student_image, _, *teacher, _, teacher_scale) = value_and_gradients(name)(*random_batch(1), *SCALES)
    assert np.any(student_image)
    assert not np.any(teacher) and teacher_scale == 0


@every_loss
@settings(max_examples=25, deadline=None)
@given(weight=st.lists(st.sampled_from([0.0, 1.0]), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 99))
def test_weight_zero_removes_the_sample(name: str, weight: list[float], seed: int) -> None:
    batch, unmasked = tuple(map(on_grid, random_batch(seed))), np.array(weight) > 0
    expected = oracle(name, *(array[unmasked] for array in batch), *SCALES) if unmasked.any() else 0.0
    for array, garbage in zip(batch, (np.nan, 7.0, np.inf, -3.0), strict=True):
        array[~unmasked] = garbage
    value, gradients = value_and_gradients(name)(*batch, *SCALES, np.array(weight))
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[0][~unmasked]) and not np.any(gradients[1][~unmasked])


@every_loss
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(BATCH)))
def test_order_of_the_batch_is_irrelevant(name: str, order: list[int]) -> None:
    batch = random_batch(2)
    value, _ = value_and_gradients(name)(*(array[order] for array in batch), *SCALES)
    np.testing.assert_allclose(value, oracle(name, *batch, *SCALES), rtol=2e-6)


@every_loss
def test_bfloat16_embeddings_are_computed_in_float32(name: str) -> None:
    batch = tuple(jnp.asarray(array, jnp.bfloat16) for array in random_batch(3))
    value, _ = value_and_gradients(name)(*batch, *SCALES)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(name, *batch, *SCALES), rtol=2e-6)


@every_loss
def test_a_sharded_batch_has_the_loss_of_the_whole(name: str) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    batch, unmasked = random_batch(4, 16), np.arange(16) % 3 > 0
    value, gradients = value_and_gradients(name)(
        *jax.device_put(batch, by_sample), *SCALES, jax.device_put(unmasked, by_sample)
    )
    np.testing.assert_allclose(value, oracle(name, *(array[unmasked] for array in batch), *SCALES), rtol=2e-6)
    assert gradients[0].sharding.is_equivalent_to(by_sample, 2)


def test_the_teacher_may_be_wider_than_the_student() -> None:
    v, t, V, T = unit_vectors(0), unit_vectors(1), unit_vectors(2, width=11), unit_vectors(3, width=11)
    np.testing.assert_allclose(losses.crd(v, t, 20.0, (V, T, 100.0)), oracle("crd", v, t, V, T, *SCALES), rtol=2e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_crd_of_a_student_that_equals_its_teacher_is_zero(scale: float) -> None:
    v, t, _, _ = random_batch(5)
    value, gradient = jax.value_and_grad(lambda x: losses.crd(x, t, scale, (v, t, scale)))(v)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6 * scale)


def symmetric_divergence(a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> float:
    """½ mean [KL(b's target ‖ a) + KL(a's target ‖ b)] of logits; the targets are logits of their own."""
    p, q, fixed_p, fixed_q = (log_softmax(logits) for logits in (a, b, of_a, of_b))
    return (np.sum(np.exp(fixed_q) * (fixed_q - p)) + np.sum(np.exp(fixed_p) * (fixed_p - q))) / 2 / len(a)


@pytest.mark.parametrize("cross", [False, True])
def test_relational_agreement_equals_numpy_and_each_side_is_a_fixed_target(cross: bool) -> None:
    v, t, V, T = (np.float64(x) for x in random_batch(10))
    X, Y = (T, V) if cross else (V, T)
    loss = jax.jit(lambda v, t, X, Y, s, w=None: losses.relational_agreement((v, X), (t, Y), s, weight=w))
    narrow = tuple(np.float32(x) for x in (v, t, X, Y))
    a, b = 20 * v @ X.T, 20 * t @ Y.T
    np.testing.assert_allclose(loss(*narrow, 20.0), symmetric_divergence(a, b, a, b), rtol=2e-6)
    to_v, to_t, to_X, to_Y = jax.grad(loss, (0, 1, 2, 3))(*narrow, 20.0)
    assert not np.any(to_X) and not np.any(to_Y)
    rng = np.random.default_rng(0)
    for gradient, of_images in ((to_v, True), (to_t, False)):
        direction = rng.normal(size=v.shape)
        moved = []
        for step in (1e-6, -1e-6):
            ahead = (20 * (v + step * direction) @ X.T, b) if of_images else (a, 20 * (t + step * direction) @ Y.T)
            moved.append(symmetric_divergence(*ahead, a, b))
        slope = np.sum(np.float64(gradient) * direction)
        np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-5)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1.0])
    kept = mask > 0
    few = (20 * v[kept] @ X[kept].T, 20 * t[kept] @ Y[kept].T)
    np.testing.assert_allclose(loss(*narrow, 20.0, mask), symmetric_divergence(*few, *few), rtol=2e-6)


def test_relational_agreement_is_zero_if_both_modalities_are_equal_and_a_ring_computes_the_same() -> None:
    v, t, V, T = random_batch(11, 16)
    assert float(losses.relational_agreement((v, V), (v, V), 20.0)) == 0
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    batch = jax.device_put((v, t, V, T), NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        around, plain = (
            jax.jit(
                lambda v, t, V, T, exchange=exchange: losses.relational_agreement(
                    (v, V), (t, T), 20.0, exchange=exchange
                )
            )(*batch)
            for exchange in (losses.Ring(("data",), 3), None)
        )
    np.testing.assert_allclose(around, plain, rtol=1e-6)


def test_cosine_is_half_the_width_times_mse() -> None:
    v, _, V, _ = random_batch(6)
    cosine, mse = feature_distillation(v, V, "cosine"), feature_distillation(v, V, "mse")
    np.testing.assert_allclose(cosine, WIDTH / 2 * mse, rtol=1e-6)


def test_icl_chooses_uniformly_among_several_positives() -> None:
    v, t, V, T = random_batch(9)
    tokens = np.array([[1], [2], [1], [3], [1], [3], [4], [5]])
    positives = tokens == tokens.T
    image_to_text, text_to_image = log_softmax(20.0 * v @ T.T), log_softmax(20.0 * t @ V.T)
    expected = [image_to_text[i, positives[i]].mean() + text_to_image[i, positives[:, i]].mean() for i in range(BATCH)]
    np.testing.assert_allclose(icl(v, t, V, T, 20.0, tokens), -np.mean(expected) / 2, rtol=2e-6)


def test_unknown_kind_and_unprojected_student_are_named() -> None:
    v, _, V, _ = random_batch(7)
    with pytest.raises(ValueError, match="'l1' is unknown: use 'mse' or 'cosine'"):
        feature_distillation(v, V, "l1")
    with pytest.raises(ValueError, match=r"student embeddings \(8, 6\) must be projected .* \(8, 11\)"):
        feature_distillation(v, unit_vectors(0, width=11))
    with pytest.raises(ValueError, match=r"student embeddings \(8, 11\) must be projected .* \(8, 6\)"):
        feature_distillation(unit_vectors(0, width=11), v)


@pytest.mark.torch
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_equal_pytorch(name: str) -> None:
    import torch
    from open_clip.loss import DistillClipLoss
    from torch.nn import functional

    numpy_batch = (*random_batch(8), *SCALES)
    v, t, V, T, s, S = batch = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in numpy_batch]
    V, T, S = V.detach(), T.detach(), S.detach()
    student, teacher, labels = s * v @ t.T, S * V @ T.T, torch.arange(BATCH)

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    expected = {
        "crd": lambda: (divergence(student, teacher) + divergence(student.T, teacher.T)) / 2,
        "kl_mix": lambda: (
            0.35 * (divergence(student, teacher) + divergence(student.T, teacher.T))
            + 0.15 * (divergence(teacher, student) + divergence(teacher.T, student.T))
        ),
        "open_clip": lambda: DistillClipLoss()(v, t, s, V, T, S)[1],
        "affinity_mimicking": lambda: (
            functional.cross_entropy(student, teacher.softmax(1))
            + functional.cross_entropy(student.T, teacher.T.softmax(1))
        ),
        "icl": lambda: (
            (functional.cross_entropy(s * v @ T.T, labels) + functional.cross_entropy(s * t @ V.T, labels)) / 2
        ),
        "mse": lambda: functional.mse_loss(v, V),
        "cosine": lambda: (1 - (v * V).sum(1)).mean(),
    }[name]()
    expected.backward()
    value, gradients = value_and_gradients(name)(*numpy_batch)
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    for gradient, tensor in zip(gradients, batch, strict=True):
        np.testing.assert_allclose(gradient, 0 if tensor.grad is None else tensor.grad, rtol=1e-5, atol=1e-5)


def test_losses_share_their_similarities_under_jit() -> None:
    """XLA merges equal products: two losses together cost hardly more than one of them."""
    v, t, V, T = random_batch(0, 64)
    arguments = (v, t, 20.0, (V, T, 50.0))

    def flops(*functions: Callable[..., jax.Array]) -> float:
        both = jax.jit(lambda *arguments: sum(function(*arguments) for function in functions))
        return both.lower(*arguments).compile().cost_analysis()["flops"]

    one, three = flops(losses.crd), flops(losses.crd, losses.open_clip_distillation, losses.kl_mix)
    assert three < 1.2 * one
