"""The Hopper kernel without a GPU: lowered for CUDA, and computed by Pallas' GPU interpreter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tclip_jax.ternary.kernels import mosaic_gpu
from tclip_jax.ternary.kernels.reference import quantize_activations
from tclip_jax.ternary.tensor import TernaryTensor

# M, K, N, group: one scale per channel, groups that end within a block of k, padding of axes, several blocks of rows.
SHAPES = [(1, 256, 64, 256), (3, 512, 130, 256), (17, 300, 64, 100), (70, 520, 64, 48)]


def weight(length: int, columns: int, group: int) -> TernaryTensor:
    draw = np.random.default_rng(0)
    trits = draw.integers(-1, 2, (length, columns), np.int8)
    scale = (draw.integers(128, 256, (-(-length // group), columns)) / 4096).astype(np.float32)
    return TernaryTensor(jnp.asarray(trits), jnp.asarray(scale), group)


def test_words_are_the_documented_ones() -> None:
    trits = np.zeros((512, 64), np.int8)
    trits[256 + 16 * 5 + 3, 7] = -1
    words = np.asarray(mosaic_gpu.pack(TernaryTensor(jnp.asarray(trits), jnp.ones((1, 64)), 512)).data)
    assert words.shape == (64, 32) and words.nbytes == 512 * 64 // 4
    assert words.view(np.uint32)[7, 16 + 3] == 3 << 2 * 5 and np.count_nonzero(words) == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_round_trip(shape: tuple[int, int, int, int]) -> None:
    w = weight(*shape[1:])
    np.testing.assert_array_equal(mosaic_gpu.unpack(mosaic_gpu.pack(w)), w.dequantize())


def test_layers_are_packed_as_each_by_itself() -> None:
    first = weight(300, 64, 100)
    layers = [first, dataclasses.replace(first, trits=-first.trits, scale=2 * first.scale)]
    stacked = mosaic_gpu.pack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
    for i, layer in enumerate(map(mosaic_gpu.pack, layers)):
        np.testing.assert_array_equal(stacked.data[i], layer.data)
        np.testing.assert_array_equal(stacked.scale[i], layer.scale)


@pytest.mark.parametrize(("rows", "block"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (100, 64)])
def test_few_rows_take_narrow_blocks(rows: int, block: int) -> None:
    matmul = functools.partial(mosaic_gpu.matmul, activations="A32")
    program = jax.make_jaxpr(matmul)(jnp.ones((rows, 256), jnp.bfloat16), mosaic_gpu.pack(weight(256, 64, 256)))
    assert f"f32[64,{-(-rows // block) * block}]" in str(program)


@pytest.mark.parametrize(
    ("shape", "activations"),
    [(SHAPES[0], "A8"), (SHAPES[0], "A16"), *[(shape, "A32") for shape in SHAPES[1:]]],
    ids=str,
)
def test_equals_float64_in_the_interpreter(
    shape: tuple[int, int, int, int], activations: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    # The interpreter supports plain reads only, without a register layout.
    monkeypatch.setattr(mosaic_gpu.plgpu, "load", lambda ref, *_, **__: ref[...])
    w = weight(*shape[1:])
    x = jax.random.normal(jax.random.key(0), shape[:2], jnp.bfloat16).astype(jnp.float32)
    result = mosaic_gpu.matmul(
        x, mosaic_gpu.pack(w), activations=activations, interpret=interpreter.InterpretGPUParams()
    )
    exact = np.asarray(x, np.float64)
    if activations == "A8":
        rounded, level = quantize_activations(x)
        exact = np.asarray(rounded, np.float64) * np.asarray(level, np.float64)
    expected = exact @ np.asarray(w.dequantize(), np.float64)
    assert np.abs(np.asarray(result, np.float64) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("rows", "group"), [(1, 768), (20, 256), (197, 48)])
def test_is_lowered_for_cuda(rows: int, group: int) -> None:
    packed = mosaic_gpu.pack(weight(768, 128, group))
    multiply = jax.jit(functools.partial(mosaic_gpu.matmul, activations="A32"))
    exported = jax.export.export(multiply, platforms=["cuda"])(jnp.ones((rows, 768), jnp.bfloat16), packed)
    assert "mosaic_gpu" in exported.mlir_module()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"device_kind": "NVIDIA H200"}, None),
        ({"device_kind": "NVIDIA GH200 480GB"}, None),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"device_kind": "NVIDIA B200"}, "Hopper"),
        ({"platform": "tpu"}, "platform tpu"),
        ({"dtype": jnp.dtype(jnp.float32)}, "not float32"),
        ({"dtype": jnp.dtype(jnp.float32), "activations": "A8"}, None),
    ],
)
def test_says_where_it_cannot_run(changes: dict[str, Any], reason: str | None) -> None:
    arguments: dict[str, Any] = {
        "device_kind": "NVIDIA H100 80GB HBM3",
        "platform": "gpu",
        "dtype": jnp.dtype(jnp.bfloat16),
        "activations": "A32",
    }
    refusal = mosaic_gpu.unsupported(**arguments | changes)
    assert refusal is None if reason is None else reason in refusal
    assert "not run on a GPU" in mosaic_gpu.slower()
