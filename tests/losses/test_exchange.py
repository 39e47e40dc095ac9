"""Losses over eight simulated devices, gathered and in a ring, equal NumPy float64 in value and gradient."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tclip_jax.losses import contrastive, distillation
from tclip_jax.losses.exchange import Exchange, Gather, Ring, _join_chunks, _split_chunks
from tclip_jax.losses.statistics import compare, compare_rows

BATCH, AXES = 32, ("data", "fsdp")
NAMES = ("info_nce", "sigmoid", "crd", "kl", "open_clip", "affinity", "icl", "accuracy")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 4, (BATCH, 2)).astype(np.int32)
WEIGHT = np.float32(RNG.random(BATCH) > 0.2)


def unit_vectors(width: int, batch: int = BATCH) -> np.ndarray:
    x = RNG.normal(size=(batch, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


V, T = unit_vectors(9), unit_vectors(9)  # embeddings of the teacher
# Image, text, scale, bias, image and text projected to the teacher's width, ICL's scale.
STUDENT = (
    *(unit_vectors(6), unit_vectors(6), np.float32(20), np.float32(-10)),
    *(unit_vectors(9), unit_vectors(9), np.float32(2.659)),
)


def losses(student: Any, fixed: Any, exchange: Exchange) -> jax.Array:
    v, t, scale, bias, to_V, to_T, icl_scale = student
    V, T, tokens, weight = fixed
    how: dict[str, Any] = {"tokens": tokens, "weight": weight, "exchange": exchange}
    rows = compare(v, t, scale, teacher=(V, T, 50.0), bias=bias, **how)
    crossed = compare_rows(to_V, T, icl_scale, **how), compare_rows(to_T, V, icl_scale, **how)
    values = (
        *(contrastive.info_nce_of_rows(*rows), contrastive.sigmoid_of_rows(rows[0])),
        *(distillation.crd_of_rows(*rows), distillation.kl_mix_of_rows(*rows, 0.3)),
        *(distillation.open_clip_of_rows(*rows), distillation.affinity_of_rows(*rows)),
        *(contrastive.info_nce_of_rows(*crossed), contrastive.accuracy_of_rows(rows[0])),
    )
    return jnp.stack(values)


def losses_float64(student: Any, tokens: np.ndarray | None) -> np.ndarray:
    """The losses of the unmasked samples from the whole matrix of logits."""
    unmasked = WEIGHT > 0
    v, t, scale, bias, to_V, to_T, icl_scale = (x[unmasked] if np.ndim(x) else x for x in map(np.float64, student))
    V64, T64 = np.float64(V[unmasked]), np.float64(T[unmasked])
    keys = np.flatnonzero(unmasked)[:, None] if tokens is None else tokens[unmasked]
    same = (keys[:, None] == keys[None]).all(-1)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.logaddexp.reduce(x, axis=1, keepdims=True)

    def hard(*logits: np.ndarray) -> float:
        return np.mean([-np.mean(log_softmax(x)[i, same[i]]) for x in logits for i in range(len(x))])

    logits, theirs = scale * v @ t.T, 50 * V64 @ T64.T
    pairs = [(log_softmax(theirs), log_softmax(logits)), (log_softmax(theirs.T), log_softmax(logits.T))]
    forward = np.mean([np.sum(np.exp(p) * (p - q), 1) for p, q in pairs])
    reverse = np.mean([np.sum(np.exp(q) * (q - p), 1) for p, q in pairs])
    soft = -np.mean([np.sum(np.exp(p) * q, 1) for p, q in pairs])
    sigmoid = np.logaddexp(0, -np.where(same, 1, -1) * (logits + bias)).sum() / len(v)
    accuracy = same[np.arange(len(v)), logits.argmax(1)].mean()
    icl = hard(icl_scale * to_V @ T64.T, icl_scale * to_T @ V64.T)
    return np.array(
        [hard(logits, logits.T), sigmoid, forward, 0.7 * forward + 0.3 * reverse, soft, 2 * soft, icl, accuracy]
    )


@functools.cache
def mesh_of(*shape: int) -> Mesh:
    return jax.make_mesh(shape, (*AXES, "tensor"), axis_types=(AxisType.Auto,) * 3)


@functools.cache
def value_and_gradients(exchange: Exchange) -> Callable[..., Any]:
    """All losses, and the gradient of their weighted sum."""

    def run(student: Any, fixed: Any, weights: Any) -> Any:
        values, pull = jax.vjp(lambda student: losses(student, fixed, exchange), student)
        return values, *pull(weights)

    return jax.jit(run)


def run_on(mesh: Mesh, exchange: Exchange, tokens: np.ndarray | None) -> tuple[np.ndarray, list[Any]]:
    """The losses, and the gradient of each loss."""
    garbage = [np.where(WEIGHT[:, None] > 0, x, np.nan) if np.ndim(x) else x for x in STUDENT]
    place = NamedSharding(mesh, PartitionSpec(AXES)), NamedSharding(mesh, PartitionSpec())
    put = lambda tree: jax.tree.map(lambda x: jax.device_put(x, place[not np.ndim(x)]), tree)  # noqa: E731
    student, fixed = put(tuple(garbage)), put((V, T, tokens, WEIGHT))
    with jax.set_mesh(mesh):
        results = [value_and_gradients(exchange)(student, fixed, weights) for weights in np.eye(8, dtype=np.float32)]
    return np.asarray(results[0][0]), [jax.device_get(gradients) for _, gradients in results]


@functools.cache
def of_one_device(equal_text: bool) -> tuple[np.ndarray, list[Any]]:
    mesh = jax.make_mesh((1, 1, 1), (*AXES, "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    return run_on(mesh, None, TOKENS if equal_text else None)


def test_one_device_has_the_losses_and_slopes_of_numpy() -> None:
    values, gradients = of_one_device(True)
    np.testing.assert_allclose(values, losses_float64(STUDENT, TOKENS), rtol=2e-6)
    directions = [RNG.normal(size=np.shape(x)) for x in STUDENT]
    ahead, behind = (
        losses_float64([x + step * d for x, d in zip(STUDENT, directions, strict=True)], TOKENS)
        for step in (1e-6, -1e-6)
    )
    for name, each, slope in zip(NAMES[:7], gradients, (ahead - behind) / 2e-6, strict=False):
        parts = [np.sum(np.float64(g) * d) for g, d in zip(each, directions, strict=True)]
        np.testing.assert_allclose(sum(parts), slope, rtol=0, atol=2e-6 * np.abs(parts).sum(), err_msg=name)


@pytest.mark.parametrize(
    ("shape", "exchange", "equal_text"),
    [
        ((4, 2, 1), None, True),
        ((4, 2, 1), Gather(AXES), True),
        ((2, 2, 2), Gather(AXES), False),
        ((8, 1, 1), Ring(AXES), True),
        ((2, 2, 2), Ring(AXES, 2), False),
        ((1, 4, 2), Ring(AXES, 3), True),  # three chunks of three, with one sample of padding
        ((2, 1, 4), Ring(AXES, 5), False),  # four chunks of four
        ((1, 2, 4), Ring(AXES, 7), True),  # three chunks of six, with two samples of padding
        ((1, 1, 8), Ring(AXES, 8), False),  # a ring of one
    ],
)
def test_many_devices_have_the_losses_and_gradients_of_one(
    shape: tuple[int, ...], exchange: Exchange, equal_text: bool
) -> None:
    expected, expected_gradients = of_one_device(equal_text)
    values, gradients = run_on(mesh_of(*shape), exchange, TOKENS if equal_text else None)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    for name, ours, theirs in zip(NAMES, gradients, expected_gradients, strict=True):
        for ours_of, theirs_of in zip(ours, theirs, strict=True):
            tolerance = 2e-6 * max(np.abs(theirs_of).max(), 1)
            np.testing.assert_allclose(ours_of, theirs_of, rtol=0, atol=tolerance, err_msg=name)


def test_of_equal_columns_on_several_devices_the_first_is_found() -> None:
    images, texts = np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)[[5, 1, 1, 3, 4, 5, 6, 1]]
    with jax.set_mesh(mesh_of(8, 1, 1)):
        rows = jax.jit(compare_rows, static_argnames="exchange")(images, texts, 1.0, exchange=Ring(AXES))
    dense = compare_rows(images, texts, 1.0)
    np.testing.assert_array_equal(rows.hit, dense.hit)
    assert rows.hit.tolist() == [True, True, False, True, True, False, True, False]


def program(exchange: Exchange, batch: int) -> str:
    mesh = mesh_of(4, 2, 1)
    sharded, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXES), PartitionSpec()))
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype, sharding=sharded if dims else whole)  # noqa: E731
    student = (*(shape(batch, 6), shape(batch, 6), shape(), shape()), *(shape(batch, 9), shape(batch, 9), shape()))
    fixed = shape(batch, 9), shape(batch, 9), shape(batch, 2, dtype=jnp.int32), shape(batch)
    weights = jax.ShapeDtypeStruct((8,), jnp.float32)
    with jax.set_mesh(mesh):
        return value_and_gradients(exchange).lower(student, fixed, weights).compile().as_text()


def dimensions(text: str) -> set[int]:
    return {int(size) for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", text) for size in shape.split(",")}


def test_in_a_ring_no_device_ever_holds_more_rows_than_its_own() -> None:
    text = program(Ring(AXES, 16), 8 * 96)
    assert "collective-permute" in text and "all-gather" not in text
    assert max(dimensions(text)) == 96 and not re.search(r"\[96,96\]", text) and "[96,16]" in text


@pytest.mark.parametrize(
    ("rows", "most", "chunk"), [(1031, 1024, 516), (97, 32, 25), (8, 8, 8), (7, 100, 7), (5, 1, 1)]
)
def test_chunks_are_the_fewest_whatever_the_number_of_rows(rows: int, most: int, chunk: int) -> None:
    x = np.arange(2 * rows).reshape(rows, 2)
    parts = _split_chunks({"a": x, "mask": np.ones(rows, bool)}, Ring(AXES, most))
    assert parts["a"].shape == (-(-rows // most), chunk, 2) and parts["mask"].sum() == rows
    np.testing.assert_array_equal(_join_chunks(parts["a"], rows), x)


def test_gathered_every_device_holds_its_rows_of_the_logits_only() -> None:
    text = program(Gather(AXES), 8 * 96)
    assert "all-gather" in text and "all-to-all" not in text
    # Gradients of embeddings are reduce-scattered. What is all-reduced has no axis of the batch.
    reduced = re.findall(r"= (.*?) all-reduce\(", text)
    assert "reduce-scatter" in text and not {768, 96} & set().union(*map(dimensions, reduced))
    assert "[96,768]" in text and "[768,768]" not in text
