"""Losses of hidden states and relations against NumPy float64, finite differences and MiniLM in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.losses.distillation import crd, kl_mix
from tclip_jax.losses.features import hidden_matching, relation_matching

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(3, 5, 8)), RNG.normal(size=(3, 5, 8))
WIDE = RNG.normal(size=(3, 5, 12))
VALID = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)


def mse_float64(s: Any, t: Any, valid: Any) -> float:
    return np.mean(np.square(s - t)[valid])


def cosine_float64(s: Any, t: Any, valid: Any) -> float:
    return np.mean([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(s[valid], t[valid], strict=True)])


def relations_float64(s: Any, t: Any, valid: Any, heads: int = 2) -> float:
    """Compute each sample separately, without its invalid tokens."""

    def log_relations(x: Any) -> Any:
        logits = x @ x.T / np.sqrt(x.shape[1])
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    rows = []
    for ours, theirs, unmasked in zip(s, t, valid, strict=True):
        if unmasked.any():
            pairs = zip(np.split(ours[unmasked], heads, 1), np.split(theirs[unmasked], heads, 1), strict=True)
            divergences = [
                np.sum(np.exp(q) * (q - p), axis=1) for p, q in ((log_relations(a), log_relations(b)) for a, b in pairs)
            ]
            rows += list(np.mean(divergences, axis=0))
    return float(np.mean(rows))


LOSSES: dict[str, tuple[Callable[..., jax.Array], Callable[..., float], Any]] = {
    "mse": (lambda s, t, v=None: hidden_matching(s, t, "mse", v), mse_float64, TEACHER),
    "cosine": (lambda s, t, v=None: hidden_matching(s, t, "cosine", v), cosine_float64, TEACHER),
    "relations": (lambda s, t, v=None: relation_matching(s, t, 2, v), relations_float64, WIDE),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_numpy(name: str, masked: bool) -> None:
    loss, oracle, teacher = LOSSES[name]
    valid = VALID if masked else np.ones_like(VALID)
    arguments = (np.float32(STUDENT), np.float32(teacher), *([VALID] if masked else []))
    value, (gradient, of_teacher) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    s, t = (np.float64(each) for each in arguments[:2])
    np.testing.assert_allclose(value, oracle(s, t, valid), rtol=1e-5)
    direction = RNG.normal(size=s.shape)
    slope = (oracle(s + 1e-6 * direction, t, valid) - oracle(s - 1e-6 * direction, t, valid)) / 2e-6
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), slope, rtol=1e-4)
    assert not np.any(of_teacher) and not np.any(gradient[~valid])


@pytest.mark.parametrize("name", LOSSES)
def test_garbage_where_invalid_reaches_nothing_and_no_token_gives_zero(name: str) -> None:
    loss, _, teacher = LOSSES[name]
    student, garbage = np.float32(STUDENT), np.float32(STUDENT)
    garbage[~VALID] = np.nan
    value, gradient = jax.value_and_grad(loss)(garbage, np.float32(teacher), VALID)
    assert value == loss(student, np.float32(teacher), VALID) and np.isfinite(gradient).all()
    assert loss(student, np.float32(teacher), np.zeros_like(VALID)) == 0


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    for loss, _, _ in LOSSES.values():
        assert float(loss(np.float32(STUDENT), np.float32(STUDENT))) == pytest.approx(0, abs=1e-6)


@pytest.mark.torch
def test_relations_equal_minilms_in_torch() -> None:
    import torch

    def relation(x: Any, heads: int) -> Any:
        x = torch.from_numpy(x).reshape(3, 5, heads, -1).permute(0, 2, 1, 3)
        return x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5

    log_student = torch.log_softmax(relation(STUDENT, 4), -1)
    teacher = torch.softmax(relation(WIDE, 4), -1)
    expected = torch.nn.functional.kl_div(log_student, teacher, reduction="sum") / (3 * 4 * 5)
    np.testing.assert_allclose(relation_matching(jnp.asarray(STUDENT), jnp.asarray(WIDE), 4), expected, rtol=1e-5)


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_kl_mix_equals_numpy(reverse: float) -> None:
    def units(seed: int) -> np.ndarray:
        x = np.random.default_rng(seed).normal(size=(6, 4)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    v, t, V, T = map(units, range(4))

    def oracle(v: Any) -> float:
        total = 0.0
        for q, p in ((20 * v @ t.T, 50 * V @ T.T), ((20 * v @ t.T).T, (50 * V @ T.T).T)):
            q, p = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (q, p))
            total += (1 - reverse) * np.sum(np.exp(p) * (p - q)) + reverse * np.sum(np.exp(q) * (q - p))
        return total / 12

    def mix(v: np.ndarray) -> jax.Array:
        return kl_mix(v, t, 20.0, (V, T, 50.0), reverse)

    value, gradient = jax.value_and_grad(mix)(v)
    np.testing.assert_allclose(value, oracle(np.float64(v)), rtol=1e-5)
    direction = RNG.normal(size=v.shape)
    slope = (oracle(v + 1e-6 * direction) - oracle(v - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), slope, rtol=1e-4)
    if not reverse:
        assert value == crd(v, t, 20.0, (V, T, 50.0))


def test_what_cannot_be_matched_is_named() -> None:
    with pytest.raises(ValueError, match=r"states \(3, 5, 8\) must be projected to the teacher's shape \(3, 5, 12\)"):
        hidden_matching(jnp.asarray(STUDENT), jnp.asarray(WIDE))
    with pytest.raises(ValueError, match=r"states \(3, 5, 12\) must be projected to the teacher's shape \(3, 5, 8\)"):
        hidden_matching(jnp.asarray(WIDE), jnp.asarray(STUDENT))
    with pytest.raises(ValueError, match="relations of 5 tokens cannot match those of 4"):
        relation_matching(jnp.asarray(STUDENT), jnp.asarray(WIDE[:, :4]), 2)
    with pytest.raises(ValueError, match="relations of 4 tokens cannot match those of 5"):
        relation_matching(jnp.asarray(STUDENT[:, :4]), jnp.asarray(WIDE), 2)
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 relation heads"):
        relation_matching(jnp.asarray(STUDENT), jnp.asarray(WIDE), 3)
