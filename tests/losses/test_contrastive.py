"""Contrastive losses against NumPy float64, finite differences and open_clip."""

from __future__ import annotations

import functools
import re
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
from tclip_jax.losses.contrastive import sigmoid_of_rows
from tclip_jax.losses.exchange import Operand, positives_of
from tclip_jax.losses.statistics import compare_rows, masked_rows

BATCH, WIDTH = 8, 6
BIAS = -10.0
TOKENS = np.array([[1, 2], [1, 3], [1, 2], [4, 0], [1, 3], [1, 2], [2, 1], [5, 5]], np.int32)


def unit_vectors(seed: int, batch: int = BATCH) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(batch, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def on_grid(x: np.ndarray) -> np.ndarray:
    """Round to multiples of 2⁻⁸, so that float32 holds logits of up to 100 exactly."""
    return np.round(256 * x) / 256


def equal_rows(tokens: np.ndarray) -> np.ndarray:
    return np.array([[list(a) == list(b) for b in tokens] for a in tokens])


def info_nce_float64(image: np.ndarray, text: np.ndarray, scale: float, positives: np.ndarray) -> float:
    def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
        log_sum = np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return np.mean([np.mean((log_sum - logits)[i][targets[i]]) for i in range(len(logits))])

    logits = scale * image.astype(np.float64) @ text.T.astype(np.float64)
    return (cross_entropy(logits, positives) + cross_entropy(logits.T, positives.T)) / 2


def sigmoid_loss_float64(image: np.ndarray, text: np.ndarray, scale: float, positives: np.ndarray) -> float:
    logits = scale * image.astype(np.float64) @ text.T.astype(np.float64) + BIAS
    return np.logaddexp(0, -np.where(positives, logits, -logits)).sum() / len(image)


def sigmoid_loss(image: Any, text: Any, scale: Any, tokens: Any = None, weight: Any = None) -> jax.Array:
    return losses.sigmoid_loss(image, text, scale, BIAS, tokens=tokens, weight=weight)


Loss = Callable[..., jax.Array]
Oracle = Callable[..., float]
LOSSES: dict[str, tuple[Loss, Oracle]] = {
    "info_nce": (jax.jit(losses.info_nce), info_nce_float64),
    "sigmoid_loss": (jax.jit(sigmoid_loss), sigmoid_loss_float64),
}


@functools.cache
def value_and_gradients(loss: Loss) -> Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


every_loss = pytest.mark.parametrize("loss, oracle", LOSSES.values(), ids=LOSSES)
retrieval = jax.jit(losses.retrieval_accuracy)
pairs = jax.jit(positives_of)


@every_loss
@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["diagonal", "equal_text"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_value_equals_numpy(loss: Loss, oracle: Oracle, tokens: np.ndarray | None, scale: float) -> None:
    image, text = unit_vectors(0), unit_vectors(1)
    mask = np.eye(BATCH, dtype=bool) if tokens is None else equal_rows(tokens)
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        value = loss(image, text, scale, tokens=tokens)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(value, oracle(image, text, scale, mask), rtol=2e-6)


@every_loss
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradients_equal_finite_differences(loss: Loss, oracle: Oracle, scale: float) -> None:
    arguments = (unit_vectors(0), unit_vectors(1), np.array(scale))
    mask = equal_rows(TOKENS)
    _, gradients = value_and_gradients(loss)(*arguments, tokens=TOKENS)
    for i, (argument, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        expected = np.zeros(argument.shape)
        for index in np.ndindex(argument.shape):
            values = []
            for step in (1e-6, -1e-6):
                moved = argument.astype(np.float64)
                moved[index] += step
                values.append(oracle(*arguments[:i], moved, *arguments[i + 1 :], mask))
            expected[index] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * scale)


@every_loss
@settings(max_examples=25, deadline=None)
@given(weight=st.lists(st.sampled_from([0.0, 1.0]), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 99))
def test_weight_zero_removes_the_sample(loss: Loss, oracle: Oracle, weight: list[float], seed: int) -> None:
    image, text, mask = on_grid(unit_vectors(seed)), on_grid(unit_vectors(seed + 100)), equal_rows(TOKENS)
    unmasked = np.array(weight) > 0
    expected = oracle(image[unmasked], text[unmasked], 100.0, mask[unmasked][:, unmasked]) if unmasked.any() else 0.0
    image[~unmasked], text[~unmasked] = np.nan, 7.0
    value, gradients = value_and_gradients(loss)(image, text, 100.0, tokens=TOKENS, weight=np.array(weight))
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-7)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.any(gradients[0][~unmasked]) and not np.any(gradients[1][~unmasked])


@every_loss
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(BATCH)))
def test_order_of_the_batch_is_irrelevant(loss: Loss, oracle: Oracle, order: list[int]) -> None:
    image, text, mask = unit_vectors(2), unit_vectors(3), equal_rows(TOKENS)
    shuffled = loss(image[order], text[order], 10.0, tokens=TOKENS[order])
    np.testing.assert_allclose(shuffled, oracle(image, text, 10.0, mask), rtol=2e-6)


@every_loss
def test_bfloat16_embeddings_are_computed_in_float32(loss: Loss, oracle: Oracle) -> None:
    image, text = jnp.asarray(unit_vectors(4), jnp.bfloat16), jnp.asarray(unit_vectors(5), jnp.bfloat16)
    value = loss(image, text, 100.0)
    expected = oracle(np.asarray(image, np.float32), np.asarray(text, np.float32), 100.0, np.eye(BATCH, dtype=bool))
    np.testing.assert_allclose(value, expected, rtol=2e-6)


@every_loss
def test_a_sharded_batch_has_the_loss_of_the_whole(loss: Loss, oracle: Oracle) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    by_sample = NamedSharding(mesh, PartitionSpec("data"))
    image, text, weight = unit_vectors(6, 16), unit_vectors(7, 16), np.arange(16) % 3 > 0
    expected = oracle(image[weight], text[weight], 10.0, np.eye(weight.sum(), dtype=bool))
    value = loss(*jax.device_put((image, text), by_sample), 10.0, weight=jax.device_put(weight, by_sample))
    np.testing.assert_allclose(value, expected, rtol=2e-6)


@every_loss
def test_perfect_embeddings_at_scale_100_are_stable(loss: Loss, oracle: Oracle) -> None:
    image = np.eye(WIDTH, dtype=np.float32)
    value, gradients = value_and_gradients(loss)(image, image, 100.0)
    np.testing.assert_allclose(value, oracle(image, image, 100.0, np.eye(WIDTH, dtype=bool)), rtol=2e-6, atol=1e-30)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(49_405, 49_407)), min_size=5, max_size=5))
def test_equal_text_matches_equal_token_rows(rows: list[tuple[int, int]]) -> None:
    tokens = np.array(rows, np.int32)
    side = Operand(jnp.zeros((5, 2)), tokens=tokens, index=jnp.arange(5), mask=jnp.ones(5, bool))
    np.testing.assert_array_equal(pairs(side, side), equal_rows(tokens))
    np.testing.assert_array_equal(pairs(side._replace(tokens=None), side._replace(tokens=None)), np.eye(5))


def test_token_rows_of_other_lengths_are_not_compared() -> None:
    exist = {"index": jnp.arange(BATCH), "mask": jnp.ones(BATCH, bool)}
    sides = [Operand(unit_vectors(0), tokens=tokens, **exist) for tokens in (TOKENS, np.pad(TOKENS, [(0, 0), (0, 1)]))]
    with pytest.raises(ValueError, match="zip"):
        positives_of(*sides)


def test_a_sigmoid_loss_without_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="needs statistics with a bias"):
        sigmoid_of_rows(compare_rows(unit_vectors(0), unit_vectors(1), 1.0))


@pytest.mark.parametrize("images", [unit_vectors(0)[:-1], unit_vectors(0)[:, :-1], unit_vectors(0)[None]])
def test_embeddings_of_different_shapes_are_refused(images: np.ndarray) -> None:
    shapes = f"{images.shape} and {(BATCH, WIDTH)}"
    for loss in (losses.info_nce, sigmoid_loss):
        with pytest.raises(ValueError, match=re.escape(f"embeddings of images and texts are {shapes}")):
            loss(images, unit_vectors(1), 1.0)
    teacher = (images, unit_vectors(1), 1.0)
    with pytest.raises(ValueError, match="embeddings of images and texts are"):
        losses.crd(unit_vectors(0), unit_vectors(1), 1.0, teacher)


def test_masked_rows_are_zeros_in_float32() -> None:
    rows = masked_rows(jnp.full((2, 3), jnp.nan, jnp.bfloat16).at[0].set(2), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(rows, np.array([[2, 2, 2], [0, 0, 0]], np.float32), strict=True)


def test_repeated_captions_count_as_found() -> None:
    image, text = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]
    assert losses.retrieval_accuracy(image, text) == 0.5
    assert losses.retrieval_accuracy(image, text, tokens=np.array([[9], [9], [1], [2]])) == 1.0


@settings(max_examples=25, deadline=None)
@given(weight=st.lists(st.sampled_from([0.0, 1.0]), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 99))
def test_retrieval_accuracy_equals_numpy(weight: list[float], seed: int) -> None:
    image, text, mask = unit_vectors(seed), unit_vectors(seed + 100), equal_rows(TOKENS)
    unmasked = np.flatnonzero(weight)
    hits = [mask[row, unmasked[np.argmax(text[unmasked] @ image[row])]] for row in unmasked]
    text[np.array(weight) == 0] = 10 * image[0]
    value = retrieval(image, text, tokens=TOKENS, weight=np.array(weight))
    np.testing.assert_allclose(value, np.mean(hits) if hits else 0.0, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_value_and_gradients_equal_open_clip(name: str, scale: float) -> None:
    import open_clip.loss
    import torch

    arguments = [
        unit_vectors(0),
        unit_vectors(1),
        np.float32(scale),
        *([np.float32(-10)] if name == "SigLipLoss" else []),
    ]
    loss = losses.info_nce if name == "ClipLoss" else losses.sigmoid_loss
    tensors = [torch.tensor(argument, dtype=torch.float64, requires_grad=True) for argument in arguments]
    expected = getattr(open_clip.loss, name)()(*tensors)
    expected.backward()
    value, gradients = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))(*arguments)
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-5, atol=1e-6 * scale)
